"""Capture and replay, with a capture that a CPU can do: the bookkeeping around graphs. Graphs themselves: tests/gpu."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from orthrus.decoding.decoder import Decoder
from orthrus.decoding.row import Row
from orthrus.engine.engine import EngineBackend
from orthrus.engine.graphs import Graphs
from orthrus.engine.passes import Inputs, Shape
from orthrus.model.attention import View
from tests.decoding.subjects import decode_all, random_prompt, request, stock_text
from tests.engine.test_engine import engine


class Recorder:
    """A capture that does the work again at each replay, and counts."""

    def __init__(self):
        self.num_captures = self.num_replays = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.num_captures += 1

        def replay() -> None:
            self.num_replays += 1
            work()

        return replay


def inputs_of(shape: Shape) -> Inputs:
    return Inputs(shape, spare_page=0, like_VD=torch.zeros(5, 4))


def test_a_function_runs_then_is_captured_then_replayed():
    recorder, calls = Recorder(), []
    graphs = Graphs(recorder)
    inputs = inputs_of(Shape(2, 4, 4))

    def draft(inputs: Inputs) -> None:
        calls.append(inputs.shape)

    for expected in ((0, 0), (1, 1), (1, 2), (1, 3)):
        graphs.run(draft, inputs)
        assert (recorder.num_captures, recorder.num_replays) == expected
    assert len(calls) == 4, "every run does the work once"
    graphs.run(draft, inputs_of(Shape(1, 4, 4)))
    assert recorder.num_captures == len(graphs.captured) == 1, "another shape begins anew"


def test_replaying_over_other_buffers_is_caught():
    graphs = Graphs(Recorder())
    inputs = inputs_of(Shape(2, 4, 4))

    def verify(inputs: Inputs) -> None:
        pass

    for _ in range(3):
        graphs.run(verify, inputs)
    with pytest.raises(AssertionError, match="other buffers"):
        graphs.run(verify, inputs_of(Shape(2, 4, 4)))
    inputs.tables_BM = inputs.tables_BM.clone()
    with pytest.raises(AssertionError, match="other buffers"):
        graphs.run(verify, inputs)


def test_a_cycle_reads_nothing_but_its_buffers():
    """Replays do what was captured: greedy and sampled batches, rows that come, grow and end, through one recording."""
    recorder = Recorder()
    backend = engine(graphs=Graphs(recorder))
    decoder = Decoder(backend)
    prompts = [random_prompt(n, seed=n) for n in (5, 30, 17)]
    requests = [request(prompt, 20 + 15 * i, logprobs=i == 0) for i, prompt in enumerate(prompts)]
    for _ in range(2):
        texts, _ = decode_all(decoder, requests)
        for i, prompt in enumerate(prompts):
            assert texts[i] == stock_text(prompt, 20 + 15 * i)
    assert recorder.num_replays > 2 * recorder.num_captures > 0


def test_prompts_of_many_lengths_share_few_graphs():
    """Chunks are padded to a few widths, but not beyond the last position that has angles."""
    recorder = Recorder()
    backend = engine(graphs=Graphs(recorder))
    decoder, seen = Decoder(backend), []
    run = backend.passes.run
    backend.passes.run = lambda view, inputs: seen.append(inputs.shape) or run(view, inputs)
    for num_tokens in (3, 17, 16, 64, 65, 100, 128, 70, 129, 200):
        prompt = random_prompt(num_tokens, seed=num_tokens)
        texts, _ = decode_all(decoder, [request(prompt, 1)])
        assert texts == [stock_text(prompt, 1)]
    assert [shape.num_columns for shape in seen] == [16, 64, 16, 64, 128, 128, 128, 128, 256, 256]
    assert len(set(seen)) == recorder.num_captures == 4
    buffers = {inputs.hidden_RD.data_ptr() for inputs in backend._chunk_inputs.values()}
    assert len(buffers) == 1, "hidden states of all widths have one buffer"


def test_wide_models_capture_narrow_chunks(monkeypatch: pytest.MonkeyPatch):
    """Hidden states of 32, heads of 64, 48 gated values: 4 x 64 + 4 x 48 + 6 x 4 x 32 bytes a position in fp32."""
    monkeypatch.setattr("orthrus.engine.engine.CHUNK_BYTES", 100 * (256 + 192 + 768))
    backend = engine(graphs=Graphs(Recorder()))
    for num_tokens in (60, 100):
        prompt = random_prompt(num_tokens)
        texts, _ = decode_all(Decoder(backend), [request(prompt, 1)])
        assert texts == [stock_text(prompt, 1)]
    assert [shape.num_columns for shape in backend._chunk_inputs] == [64], "128 would compute with too much"


def test_padding_stops_where_angles_do():
    prompt = random_prompt(250)
    backend = engine(graphs=Graphs(Recorder()), prefill_chunk=201)
    texts, _ = decode_all(Decoder(backend), [request(prompt, 1)])
    assert texts == [stock_text(prompt, 1)]
    assert list(backend._chunk_inputs) == [Shape(1, 256, 16)], "64 columns behind 201 would end behind the 264 angles"


@pytest.mark.parametrize("chunk", [1, 63, 64, 100, 8192])
def test_a_chunk_writes_its_own_slots_and_the_spare_page(chunk: int, monkeypatch: pytest.MonkeyPatch):
    """Whatever pads it: in pages of 4 slots the table is as long as the columns, in those of 64 a page is half full.
    Chunks of more than 100 tokens are not captured here."""
    monkeypatch.setattr("orthrus.engine.engine.CHUNK_COLUMNS", (16, 64, 100))
    for page_slots in (4, 64):
        backend = engine(
            graphs=Graphs(Recorder()), prefill_chunk=chunk, page_slots=page_slots, num_pages=4096 // page_slots
        )
        watch_pages(backend, page_slots)
        prompts = [random_prompt(n, seed=n) for n in (3, 64, 65, 100, 200, 240)]
        for _ in range(2):
            texts, _ = decode_all(Decoder(backend), [request(prompt, 6) for prompt in prompts])
            assert texts == [stock_text(prompt, 6) for prompt in prompts]


def watch_pages(backend: EngineBackend, page_slots: int) -> None:
    """Have each chunk's pass checked for what it writes, and where it looks for pages."""
    run = backend._prefill_pass

    def checked(row: Row, start: int, stop: int) -> Tensor:
        keys_LPSGH = backend.passes.keys_LPSGH
        before = keys_LPSGH.clone()
        found = run(row, start, stop)
        pages = backend.tables.pages(row.index)[start // page_slots : -(-stop // page_slots)]
        changed = (before != keys_LPSGH).flatten(3).any(-1).any(0)
        assert set(changed.any(1).nonzero().flatten().tolist()) <= {*pages, backend._spare_page}
        assert not changed[pages[0], : start % page_slots].any(), "what came before is as it was"
        assert all(backend.pool.num_holders(page) == 1 for page in pages)
        return found

    def placed(view: View, inputs: Inputs) -> Tensor:
        end = int(inputs.lengths_B.max()) + inputs.shape.num_columns
        assert end <= inputs.shape.num_pages * page_slots, "a column would look for its page behind the table"
        return pass_over(view, inputs)

    pass_over = backend.passes.run
    backend._prefill_pass, backend.passes.run = checked, placed


def test_without_a_capture_everything_runs_as_it_is():
    graphs = Graphs.on(torch.device("cpu"))
    decode_all(Decoder(engine(graphs=graphs)), [request(random_prompt(5), 30)])
    assert not graphs.captured
