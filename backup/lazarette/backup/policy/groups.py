"""Volumes that are saved together, at one instant.

Volumes of one container, or of one compose project, hold one state: a database and its log on two
volumes, an index beside the documents.  So those of them that a policy means are one *group*: one
snapshot of all, held still together, or not saved at all.  Volumes that nothing ties are groups of
their own, and the fault of one does not hinder the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lazarette.backup.policy.model import Origin, Policy, Targets, Volume

_BY_LABEL = (Origin.VOLUME_LABELS, Origin.CONTAINER_LABELS)


def groups(volumes: Sequence[Volume]) -> list[list[str]]:
    """Names of the volumes, those together that something ties, in the order of names."""
    found: list[tuple[set[str], set[str]]] = []
    for volume in volumes:
        names, bonds = {volume.name}, set(volume.bonds)
        apart = []
        for other in found:
            if bonds & other[1]:
                names |= other[0]
                bonds |= other[1]
            else:
                apart.append(other)
        found = [*apart, (names, bonds)]
    return sorted(sorted(names) for names, _ in found)


def together(found: Mapping[str, Policy], volumes: Mapping[str, Volume]) -> dict[str, Policy]:
    """Policies by labels, one for each group of volumes whose labels say the same.

    Args:
        found: the policy of each volume.
        volumes: what is known of each.

    Returns:
        The same, where labels of several volumes of a group became one policy with the names of
        all: it has one schedule and one history.
    """
    made = dict(found)
    left = [name for name, policy in found.items() if policy.origin in _BY_LABEL]
    while left:
        rule = _rule(found[left[0]])
        alike = [name for name in left if _rule(found[name]) == rule]
        left = [name for name in left if name not in alike]
        for group in groups([volumes[name] for name in alike]):
            for name in group:
                made[name] = replace(found[name], name="+".join(group))
    return made


def _rule(policy: Policy) -> Policy:
    """What a policy says, without what tells it from others that say the same."""
    return replace(policy, name="", source="", origin=Origin.SET, targets=Targets())
