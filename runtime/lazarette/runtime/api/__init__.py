"""The Docker Engine API and /lazarette/v1: parse, call, render."""
