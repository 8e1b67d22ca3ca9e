"""llm, the command, told of the server in extra-openai-models.yaml."""

import json
import os
import subprocess
import sys
import time

import pytest

FRANCE = "Complete the sentence: The capital of France is"
GREEDY = ["-o", "temperature", "0", "-o", "max_tokens", "60"]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory, url: str, key: str, model: str) -> dict[str, str]:
    """With the folder of a user who has told llm of the server: its chat, its responses, and its completions."""
    entry = f"""
- model_id: NAME
  model_name: {model}
  api_base: {url}/v1
  api_key_name: engineshed
  supports_schema: true
  supports_tools: true
"""
    entries = [
        entry.replace("NAME", "shed"),
        entry.replace("NAME", "shed-responses") + "  responses: true\n",
        entry.replace("NAME", "shed-completion") + "  completion: true\n",
    ]
    folder = tmp_path_factory.mktemp("llm")
    (folder / "extra-openai-models.yaml").write_text("".join(entries))
    (folder / "keys.json").write_text(json.dumps({"engineshed": key}))
    return {**os.environ, "LLM_USER_PATH": str(folder), "PYTHONUNBUFFERED": "1"}


def llm(environment: dict[str, str], *arguments: str) -> str:
    """What the command prints."""
    command = [sys.executable, "-m", "llm", *arguments]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["shed", "shed-responses"])
def test_a_prompt_is_answered_at_once_and_word_by_word(environment: dict[str, str], name: str) -> None:
    whole = llm(environment, "-m", name, *GREEDY, "--no-stream", FRANCE)
    assert "Paris" in whole
    assert llm(environment, "-m", name, *GREEDY, FRANCE) == whole


def test_the_answer_comes_while_it_is_made(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "llm", "-m", "shed", "-o", "seed", "1", "-o", "max_tokens", "120", "Tell me a story."]
    arrivals = []
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        while data := os.read(running.stdout.fileno(), 65536):
            arrivals.append(time.monotonic())
            assert data
    assert running.returncode == 0
    assert len(arrivals) > 10


def test_a_completion_goes_on_with_its_prompt(environment: dict[str, str]) -> None:
    assert "Paris" in llm(environment, "-m", "shed-completion", *GREEDY, "The capital of France is")


def test_a_conversation_goes_on(environment: dict[str, str]) -> None:
    llm(environment, "-m", "shed", *GREEDY, "My name is Ada.")
    assert llm(environment, "-c", *GREEDY, "What is my name?").strip()
    first, second = json.loads(llm(environment, "logs", "list", "--json", "-n", "2"))
    assert first["conversation_id"] == second["conversation_id"]


@pytest.mark.parametrize("name", ["shed", "shed-responses"])
def test_a_schema_is_kept_to(environment: dict[str, str], name: str) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 40}, "capital": {"type": "boolean"}},
        "required": ["name", "capital"],
        "additionalProperties": False,
    }
    answer = json.loads(llm(environment, "-m", name, *GREEDY, "--schema", json.dumps(schema), "Describe Paris."))
    assert isinstance(answer["name"], str)
    assert isinstance(answer["capital"], bool)


@pytest.mark.parametrize("name", ["shed", "shed-responses"])
def test_tools_are_offered(environment: dict[str, str], name: str) -> None:
    llm(environment, "-m", name, *GREEDY, "-T", "llm_version", "Which version are you?")
    (logged,) = json.loads(llm(environment, "logs", "list", "--json", "-n", "1"))
    assert [tool["name"] for tool in logged["tools"]] == ["llm_version"]
