"""What the manifest says of an engine's memory, held against what a real worker takes."""

from pathlib import Path

import pytest

from runtime import bundle
from runtime.footprint import footprint
from tests import filling


@pytest.mark.parametrize(("variant", "slots", "context"), [("cpu-fp32", 64, 512), ("cpu-int4", 2, 64)])
def test_a_worker_whose_slots_are_full_takes_no_more_than_was_reckoned(
    tiny_bundle: Path, tmp_path: Path, variant: str, slots: int, context: int
) -> None:
    manifest = bundle.read(tiny_bundle)
    reckoned = footprint(manifest.variant(variant), slots, context, manifest.vocab_size)
    assert filling.peak(tiny_bundle, variant, slots, context, f"ipc://{tmp_path}/socket") <= reckoned.total
    assert reckoned.kv == manifest.variant(variant).kv_bytes_per_token * slots * context
    assert f"{slots} slots of {context} tokens" in reckoned.arithmetic()
