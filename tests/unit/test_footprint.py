"""What a manifest tells of an engine's memory, beside the memory that a real worker takes."""

from pathlib import Path

import pytest

from runtime import bundle
from runtime.footprint import MIB, footprint
from runtime.messages import Generate, Progress, Sampling
from tests.unit.test_worker import Front, worker

CONTEXT = 256
ANSWER = 16


def peak(pid: int) -> int:
    """The most bytes of memory that the process has taken so far, files' pages among them."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


@pytest.mark.parametrize(("variant", "slots"), [("cpu-fp32", 1), ("cpu-fp32", 64), ("cpu-int4", 64)])
def test_a_worker_whose_slots_are_full_stays_within_its_footprint(
    tiny_bundle: Path, tmp_path: Path, variant: str, slots: int
) -> None:
    address = f"ipc://{tmp_path}/worker.sock"
    options = (f"--variant={variant}", f"--slots={slots}", f"--context={CONTEXT}")
    with worker(tiny_bundle, address, *options) as process:
        front = Front(address)
        front.wait_ready()
        for i in range(slots):
            prompt = [3 + (i * 7 + j * j) % 500 for j in range(CONTEXT - ANSWER)]
            sampling = Sampling(temperature=0.8, top_p=0.9, seed=i)
            front.send(Generate(str(i), prompt, max_tokens=CONTEXT, sampling=sampling))
        ended = 0
        while ended < slots:
            reply = front.receive()
            if isinstance(reply, Progress):
                assert not {row.finish for row in reply.rows} & {"error", "cancelled"}
                ended += sum(row.finish is not None for row in reply.rows)
        taken = peak(process.pid)
    manifest = bundle.read(tiny_bundle)
    bound = footprint(manifest.variant(variant), manifest.vocab_size, slots=slots, context=CONTEXT).total
    assert taken <= bound <= 1.5 * taken


def test_the_sum_is_told_as_it_is_made(tiny_bundle: Path) -> None:
    manifest = bundle.read(tiny_bundle)
    need = footprint(manifest.variant("cpu-fp32"), manifest.vocab_size, slots=8, context=4096)
    assert need.kv == 8 * 4096 * 512 == 16 * MIB  # 2 layers x 2 heads x (16 + 16) float32
    assert need.total == need.process + need.weights + need.kv + need.workspace
    assert need.arithmetic().startswith("weights 1 MiB + 8 slots x 4096 tokens x 512 bytes = 16 MiB of KV + ")
    assert need.arithmetic().endswith(" MiB for the process and a step's workspace")
