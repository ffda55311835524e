"""The engine answers many requests at once, each as if it were alone, with its own adapter, and forgets who leaves."""

import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmforge.errors import InputError, ModelError
from llmforge.models.adapters import NotShareableError
from llmforge.serve.engines.transformers import TransformersEngine
from llmforge.serve.requests import FinishReason, OverloadedError, Request, Sampling, Token, Update
from small_models import SMALL, VOCABULARY

CPU = torch.device("cpu")
GREEDY = {"temperature": 0.0}


def build(seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**SMALL, **more})).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


class Heard:
    """Listens to one answer."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.last: Update | None = None
        self.done = threading.Event()

    def __call__(self, update: Update) -> None:
        self.tokens += update.tokens
        if update.finish or update.error:
            assert self.last is None
            self.last = update
            self.done.set()

    def ids(self) -> list[int]:
        assert self.done.wait(60)
        assert self.last is not None
        assert self.last.error is None
        return [token.id for token in self.tokens]

    @property
    def finish(self) -> FinishReason | None:
        self.ids()
        assert self.last is not None
        return self.last.finish


def ask(engine: TransformersEngine, prompt: Sequence[int], adapter: str | None = None, **sampling: Any) -> Heard:
    heard = Heard()
    stops = frozenset(sampling.pop("stops", ()))
    engine.submit(Request(prompt, Sampling(**{"max_tokens": 20, **GREEDY, **sampling}), stops, adapter), heard)
    return heard


@pytest.fixture
def engine() -> Iterator[TransformersEngine]:
    made = TransformersEngine(build(), None, device=CPU, dtype="fp32", max_batch=8)
    yield made
    made.close()


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(3, VOCABULARY) for _ in range(numbers.choice((1, 7, 60, 300)))] for _ in range(count)]


def generated(model: Any, prompt: Sequence[int], new: int = 20) -> list[int]:
    """Give what transformers' own `generate` answers."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None
        )
    return output[0, len(prompt) :].tolist()


def test_answers_together_are_those_of_transformers_alone(engine: TransformersEngine) -> None:
    plain = build()
    asked = prompts(24)
    heard = [ask(engine, prompt) for prompt in asked]
    assert [h.ids() for h in heard] == [generated(plain, prompt) for prompt in asked]
    assert {h.finish for h in heard} == {"length"}
    assert engine.stats() == {"running": 0, "waiting": 0, "cached_tokens": 0, "adapter_bytes": 0}


def test_an_answer_ends_at_its_stop_token_and_at_the_end_of_the_context(engine: TransformersEngine) -> None:
    whole = ask(engine, [5, 6, 7]).ids()
    stop = whole[4]
    stopped = ask(engine, [5, 6, 7], stops=[stop])
    assert stopped.ids() == whole[: whole.index(stop) + 1]
    assert stopped.finish == "stop"
    assert ask(engine, [5, 6, 7], stops=[stop], ignore_stops=True).ids() == whole
    at_the_end = ask(engine, [9] * 505, max_tokens=999)
    assert len(at_the_end.ids()) == 512 - 505
    assert at_the_end.finish == "length"


def test_who_leaves_frees_the_place_at_once(engine: TransformersEngine) -> None:
    long = [Heard() for _ in range(8)]
    tickets = [engine.submit(Request([7, n + 3], Sampling(400, **GREEDY)), h) for n, h in enumerate(long)]
    waiting = ask(engine, [11, 12], max_tokens=3)
    while not all(h.tokens for h in long):
        time.sleep(0.001)
    assert engine.stats()["waiting"] == 1
    before = len(long[0].tokens)
    tickets[0].cancel()
    assert waiting.ids() == generated(build(), [11, 12], 3)
    assert long[0].finish == "cancelled"
    assert len(long[0].tokens) <= before + 10
    tickets[0].cancel()  # once more does nothing
    queued = Heard()
    ticket = engine.submit(Request([3], Sampling(4)), queued)
    ticket.cancel()
    assert queued.done.wait(30)
    for ticket in tickets:
        ticket.cancel()
    assert [h.finish for h in long] == ["cancelled"] * 8


def test_what_cannot_be_answered_is_refused_before_it_waits() -> None:
    engine = TransformersEngine(build(), None, device=CPU, dtype="fp32", max_batch=1, max_waiting=2)
    try:
        for prompt, message in (
            ([], "0 tokens"),
            ([5] * 512, "512 tokens; allowed are 1 to 511"),
            ([96], "token id 96"),
        ):
            with pytest.raises(InputError, match=message):
                ask(engine, prompt)
        with pytest.raises(InputError, match="no adapter 'nobody'"):
            ask(engine, [5], adapter="nobody")
        with pytest.raises(InputError, match="token id 1000 is not"):
            ask(engine, [5], logit_bias={1000: 1.0})
        burst = [ask(engine, [5], max_tokens=1) for _ in range(3)]  # one for the batch, which is still empty
        assert [len(h.ids()) for h in burst] == [1, 1, 1]
        first = ask(engine, [5], max_tokens=500)
        while not first.tokens:
            time.sleep(0.001)
        rest = [ask(engine, [5], max_tokens=2) for _ in range(2)]
        with pytest.raises(OverloadedError, match="2 requests are waiting") as refused:
            ask(engine, [5])
        assert refused.value.retry_after >= 1
        assert [len(h.ids()) for h in rest] == [2, 2]
    finally:
        engine.close()


def test_memory_bounds_how_many_are_let_in() -> None:
    engine = TransformersEngine(build(), None, device=CPU, dtype="fp32", cache_bytes=3 * 256 * 2 * 2 * 2 * 8 * 4)
    try:
        heard = [ask(engine, [5, n + 3], max_tokens=200) for n in range(7)]
        most = 0
        while not heard[-1].done.is_set():
            most = max(most, int(engine.stats()["running"]))
        assert most == 3, engine.note
        assert all(len(h.ids()) == 200 for h in heard)
        with pytest.raises(InputError, match=r"GB of memory.*max_tokens"):
            ask(engine, [5], max_tokens=500)
    finally:
        engine.close()


def test_closing_tells_everybody(engine: TransformersEngine) -> None:
    heard = [ask(engine, [5, n + 3], max_tokens=500) for n in range(12)]
    engine.close()
    assert {h.finish for h in heard} <= {"cancelled", "length"}
    with pytest.raises(OverloadedError, match="stopped"):
        ask(engine, [5])


def test_a_step_that_fails_ends_its_answers_and_not_the_engine(engine: TransformersEngine) -> None:
    layer = engine.model.model.layers[0]

    def fail(*_: Any) -> None:
        raise RuntimeError("a cosmic ray")

    handle = layer.register_forward_pre_hook(fail)
    heard = ask(engine, [5, 6])
    assert heard.done.wait(30)
    handle.remove()
    assert heard.last is not None
    assert isinstance(heard.last.error, ModelError)
    assert "a cosmic ray" in str(heard.last.error)
    assert ask(engine, [5, 6]).ids() == generated(build(), [5, 6])


def test_the_same_seed_draws_the_same_answer_in_any_company(engine: TransformersEngine) -> None:
    alone = ask(engine, [8, 9], temperature=1.0, seed=3).ids()
    company = [ask(engine, prompt, temperature=1.0) for prompt in prompts(6)]
    assert ask(engine, [8, 9], temperature=1.0, seed=3).ids() == alone
    assert ask(engine, [8, 9], temperature=1.0, seed=4).ids() != alone
    assert len({tuple(h.ids()) for h in company}) == 6


def save_adapter(directory: Path, seed: int, **options: Any) -> Path:
    """Save an adapter of PEFT's, every weight of which matters."""
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    model = peft.get_peft_model(build(), peft.LoraConfig(**fields))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(directory, save_embedding_layers=False)
    return directory


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "another rank": {"r": 16, "lora_alpha": 4},
    "rslora": {"use_rslora": True},
    "all layers": {"target_modules": "all-linear"},
    "what LLMForge recommends": {"target_modules": ["q_proj", "up_proj", "embed_tokens", "lm_head"]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.0\.self_attn\.v_proj": 32}},
}


@pytest.mark.parametrize("limit", ["", "_MOST_STACKED", "_MOST_BYTES"])
def test_requests_for_different_adapters_share_steps(
    limit: str, engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with adapters that are not stacked, as for many tokens and for large ones."""
    if limit:
        monkeypatch.setattr(f"llmforge.models.adapters.{limit}", 0)
    expected: dict[str | None, list[list[int]]] = {None: [generated(build(), p) for p in prompts(4)]}
    for seed, (kind, options) in enumerate(KINDS.items()):
        directory = save_adapter(tmp_path / kind, seed, **options)
        engine.add_adapter(kind, directory)
        expected[kind] = [generated(peft.PeftModel.from_pretrained(build(), directory), p) for p in prompts(4)]
    heard = {name: [ask(engine, p, adapter=name) for p in prompts(4)] for name in expected}
    assert {name: [h.ids() for h in answers] for name, answers in heard.items()} == expected
    assert len({str(answers) for answers in expected.values()}) == len(expected)
    assert engine.stats()["adapter_bytes"] > 0


def test_an_adapter_that_is_replaced_answers_at_once(engine: TransformersEngine, tmp_path: Path) -> None:
    """With the same names in a batch as before."""
    first, second, other = (save_adapter(tmp_path / str(seed), seed) for seed in (1, 2, 3))
    engine.add_adapter("other", other)
    answers = []
    for directory in (first, second):
        engine.add_adapter("replaced", directory)
        heard = [ask(engine, [5, 6], adapter=name) for name in ("replaced", "other")]
        answers.append([h.ids() for h in heard])
        engine.remove_adapter("replaced")
    expected = [generated(peft.PeftModel.from_pretrained(build(), d), [5, 6]) for d in (first, second, other)]
    assert answers == [[expected[0], expected[2]], [expected[1], expected[2]]]
    assert expected[0] != expected[1]


def test_an_adapter_with_values_that_are_no_numbers_is_refused(engine: TransformersEngine, tmp_path: Path) -> None:
    """In a batch they could reach the answers of others."""
    file = save_adapter(tmp_path, 1) / "adapter_model.safetensors"
    weights = load_file(file)
    weights[next(name for name in weights if "lora_B" in name)][0, 0] = float("nan")
    save_file(weights, file)
    with pytest.raises(ModelError, match=r"damaged: .*proj holds values that are not finite"):
        engine.add_adapter("damaged", tmp_path)


def test_adapters_come_and_go_without_a_request_noticing(engine: TransformersEngine, tmp_path: Path) -> None:
    engine.add_adapter("stays", save_adapter(tmp_path / "a", 1))
    expected = ask(engine, [5, 6], adapter="stays", max_tokens=300).ids()
    again = ask(engine, [5, 6], adapter="stays", max_tokens=300)
    other = save_adapter(tmp_path / "b", 2)
    for _ in range(5):
        engine.add_adapter("goes", other)
        assert len(ask(engine, [7], adapter="goes", max_tokens=2).ids()) == 2
        engine.remove_adapter("goes")
    engine.remove_adapter("stays")  # waits for the request
    assert again.ids() == expected
    deadline = time.monotonic() + 10
    while engine.stats()["adapter_bytes"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats()["adapter_bytes"] == 0
    with pytest.raises(InputError, match="no adapter 'stays'"):
        ask(engine, [5], adapter="stays")


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}],
    ids=str,
)
def test_adapters_that_change_more_need_a_base_of_their_own(
    engine: TransformersEngine, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(NotShareableError, match="cannot share its base model"):
        engine.add_adapter("more", save_adapter(tmp_path, 1, **options))


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    for number, other in enumerate(({"hidden_size": 64}, {"num_hidden_layers": 1})):
        engine = TransformersEngine(build(**other), None, device=CPU, dtype="fp32")
        try:
            with pytest.raises(ModelError, match="trained on another base model"):
                engine.add_adapter("foreign", save_adapter(tmp_path / str(number), 1))
        finally:
            engine.close()


def test_an_adapter_of_another_vocabulary_gets_a_base_of_its_own(tmp_path: Path) -> None:
    """A run may have added tokens."""
    engine = TransformersEngine(build(vocab_size=VOCABULARY + 8), None, device=CPU, dtype="fp32")
    try:
        for layer in ("embed_tokens", "lm_head"):
            with pytest.raises(NotShareableError, match=f"another vocabulary: its .*{layer} is "):
                engine.add_adapter("more", save_adapter(tmp_path / layer, 1, target_modules=[layer]))
    finally:
        engine.close()


def test_nothing_is_kept_of_a_thousand_requests(engine: TransformersEngine) -> None:
    numbers = random.Random(0)
    for _ in range(50):
        heard, tickets = [Heard() for _ in range(20)], []
        for h in heard:
            prompt = [numbers.randrange(VOCABULARY) for _ in range(numbers.randrange(1, 20))]
            tickets.append(engine.submit(Request(prompt, Sampling(numbers.randrange(1, 6), seed=1)), h))
        for ticket in numbers.sample(tickets, 7):
            ticket.cancel()
        assert all(h.done.wait(30) for h in heard)
    assert engine.stats()["running"] == engine.stats()["waiting"] == 0
    assert engine._reserved == 0
    assert engine._stepper._cache._slabs == {}  # type: ignore[attr-defined]
