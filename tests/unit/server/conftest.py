from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from runtime.bundle import FORMAT, TEMPLATE, TOKENIZER, Bundle, File, Source, Variant
from runtime.text import Text
from server.engine_client import EngineClient
from tests.unit.server.house import House, service_for, serving
from tests.unit.server.scripted import READY, Attached, ScriptedWorker

CHAT_TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


@pytest.fixture
def bundle() -> Bundle:
    engine = File("cpu-int4/model.onnx", "0123456789abcdef", 1)
    variant = Variant("cpu-int4", "cpu", "int4", "float32", engine.path, (engine,), (), "test")
    texts = (File(TOKENIZER, "0123", 1), File(TEMPLATE, "4567", 1))
    return Bundle(FORMAT, "tiny", Source("folder", "tiny"), "llama", 256, 64, (255,), {}, texts, (variant,), 1_700_000_000)


@pytest.fixture
def text(tmp_path: Path, bundle: Bundle) -> Text:
    """A tokenizer with one token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: id for id, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / TOKENIZER))
    (tmp_path / TEMPLATE).write_text(CHAT_TEMPLATE)
    return Text.load(tmp_path, bundle)


@pytest.fixture
async def house(tmp_path: Path, bundle: Bundle, text: Text) -> AsyncIterator[House]:
    ready = msgspec.structs.replace(READY, context=bundle.max_length)
    async with ScriptedWorker(f"ipc://{tmp_path}/worker", text, ready) as worker:
        client = EngineClient(worker.address)
        await client.attach()
        engine = Attached(client)
        service = service_for(bundle, text, engine)
        async with serving(service) as http:
            yield House(worker, engine, service, http)
        client.close(ConnectionError("the test is over"))
