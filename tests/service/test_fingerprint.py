"""What holds where a request says nothing of sampling, and the fingerprint, through all processes of a real server."""

from pathlib import Path
from typing import Any

import msgspec

from runtime import bundle as bundles
from runtime.bundle import MANIFEST, SamplingDefaults
from tests.service.conftest import Running, serve

PROMPT = [5, 6, 7, 8, 9]
CONNECTIONS = 8
"""Of which a kernel gives some to either of two HTTP processes."""


def rewrite(folder: Path, **changes: Any) -> None:
    """Publish the bundle again with another manifest."""
    manifest = msgspec.structs.replace(bundles.read(folder), **changes)
    draft = folder / ".draft"
    draft.write_bytes(msgspec.json.encode(manifest))
    draft.rename(folder / MANIFEST)


def with_other_weights(folder: Path) -> None:
    """The same graph, one weight of which has another value."""
    manifest = bundles.read(folder)
    (variant,) = manifest.variants
    path = next(file.path for file in variant.files if file.path != variant.model)
    weights = folder / path
    changed = weights.read_bytes()[:-1] + b"\x01"
    weights.unlink()  # which is a link to what other tests use
    weights.write_bytes(changed)
    files = tuple(bundles.describe(folder, file.path) for file in variant.files)
    assert files != variant.files
    rewrite(folder, variants=(msgspec.structs.replace(variant, files=files),))


async def silent(running: Running, model: str, **fields: Any) -> dict[str, Any]:
    """The answer to a request that says nothing of how tokens are drawn, over a connection of its own."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 16, "ignore_eos": True, **fields}
    async with running.http.post("/v1/completions", json=body, headers={"Connection": "close"}) as response:
        assert response.status == 200, await response.text()
        answer: dict[str, Any] = await response.json()
        return answer


async def texts(running: Running, model: str, count: int = 3) -> set[str]:
    return {(await silent(running, model))["choices"][0]["text"] for _ in range(count)}


async def test_one_question_has_one_answer_where_the_authors_want_it_so(engines: Path, tmp_path: Path) -> None:
    for name in ("alpha", "beta"):
        rewrite(engines / name, sampling=SamplingDefaults(temperature=0.01, top_k=1))
    config = tmp_path / "serve.toml"
    config.write_text("[models.beta]\ngeneration_config = 'none'\n[models.gamma.sampling]\ntop_k = 1\n")
    async with serve(engines, f"--config={config}", "--model=alpha,beta,gamma") as running:
        async with running.http.get("/v1/models") as response:
            shown = {model["id"]: model["sampling"] for model in (await response.json())["data"]}
        assert [(shown[name]["temperature"], shown[name]["top_k"]) for name in shown] == [(0.01, 1), (1, 0), (1, 1)]
        greedy = (await silent(running, "alpha", temperature=0))["choices"][0]["text"]
        assert await texts(running, "alpha") == await texts(running, "gamma") == {greedy}
        assert len(await texts(running, "beta")) == 3, "at OpenAI's temperature of 1, whatever its authors say"
        assert len({(await silent(running, "alpha", temperature=1, top_k=0))["choices"][0]["text"] for _ in range(3)}) == 3


async def test_the_fingerprint_is_of_everything_that_decides_a_token(engines: Path) -> None:
    async def told(running: Running, model: str = "alpha") -> str:
        found = {(await silent(running, model))["system_fingerprint"] for _ in range(CONNECTIONS)}
        assert len(found) == 1, "in every process the same"
        return str(found.pop())

    async with serve(engines, "--http-processes=2", "--model=alpha") as running:
        first = await told(running)
        assert await told(running, "beta") == first, "a name decides nothing"
    async with serve(engines, "--http-processes=2", "--model=alpha", "--slots=2", "--no-speculation") as running:
        assert await told(running) == first, "after another start, too"
        with_other_weights(engines / "alpha")
        assert (await running.act("alpha", "reload"))[0] == 200
        other = await told(running)
        assert other != first
        rewrite(engines / "alpha", sampling=SamplingDefaults(temperature=0.5))
        assert (await running.act("alpha", "reload"))[0] == 200
        assert await told(running) not in (first, other)
