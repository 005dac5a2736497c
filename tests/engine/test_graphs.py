"""Capture and replay, with a capture that a CPU can do: the bookkeeping around graphs. Graphs themselves: tests/gpu."""

from collections.abc import Callable

import pytest
import torch

from orthrus.decoding.decoder import Decoder
from orthrus.engine.engine import MIN_CHUNK_COLUMNS
from orthrus.engine.graphs import Graphs
from orthrus.engine.passes import Inputs, Shape
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
    assert recorder.num_captures == graphs.num_captured == 1, "another shape begins anew"


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
    for num_tokens in (3, 64, 65, 100, 128, 70, 129, 200):
        prompt = random_prompt(num_tokens, seed=num_tokens)
        texts, _ = decode_all(decoder, [request(prompt, 1)])
        assert texts == [stock_text(prompt, 1)]
    assert [shape.num_columns for shape in seen] == [64, 64, 128, 128, 128, 128, 256, 256]
    assert len(set(seen)) == recorder.num_captures == 3
    prompt = random_prompt(240)
    row = decoder.admit(request(prompt[:220], 1)).row
    last = decoder.admit(request(prompt, 1), reuse_row=row)
    assert list(last.token_ids) == stock_text(prompt, 1)
    assert seen[-1].num_columns < MIN_CHUNK_COLUMNS, "angles end behind 256 positions and a block"


def test_without_a_capture_everything_runs_as_it_is():
    graphs = Graphs.on(torch.device("cpu"))
    decode_all(Decoder(engine(graphs=graphs)), [request(random_prompt(5), 30)])
    assert graphs.num_captured == 0
