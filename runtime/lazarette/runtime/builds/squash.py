"""``--squash``: the layers of a build become one on its base image."""

from __future__ import annotations

import os

from lazarette.runtime.builds.state import StageState
from lazarette.runtime.builds.work import Work, parent_layer
from lazarette.runtime.images.model import chain_ids
from lazarette.storage.layers.apply import DirectWhiteouts, LayerReader


def squashed(work: Work, state: StageState) -> None:
    """Merge the layers above the base into one; the history keeps their steps, as empty."""
    own = state.diff_ids[state.base_layers :]
    if not own:
        return
    images = work.services.images
    chain = chain_ids(state.diff_ids)
    base = chain[state.base_layers - 1] if state.base_layers else ""
    with work.active(parent_layer(base)) as layer:
        for one in chain[state.base_layers :]:
            stored = images.layers.get(one)
            if stored is None:
                continue
            with images.layers.open_tar(stored) as tar:
                root = os.dup(layer.tree.fd)
                try:
                    LayerReader(root, DirectWhiteouts()).apply(tar)
                finally:
                    os.close(root)
        made = layer.keep(base)
    for line in state.history[state.base_history :]:
        line.empty_layer = True
    state.diff_ids = state.diff_ids[: state.base_layers] + ([made.diff_id] if made else [])
    target = state.base_id or "scratch"
    state.record("", work.now_ns(), empty=made is None, comment=f"merge build to {target}")
