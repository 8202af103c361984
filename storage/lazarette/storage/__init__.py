"""Where bytes live on this host: layer and volume drivers."""
