"""`python -m tests.vllm.program < plan.json`: one vLLM engine in a process of its own, which prints a line of JSON
behind `ANSWER`.

A plan is {"engine": keywords of vllm.LLM, "rounds": [{"prompts", "sampling", "fault"}, ..]}; a round's answer has the
text of each prompt as token ids, how much of its prompt came from the prefix cache, what the round added to vLLM's
counters of drafting, and what each rank's self-check found. "fault" names a mistake of `tests.vllm.worker` that is
planted in the running engine. A round with "arrivals" and "lengths" has its prompts come after so many steps and leave
after so many tokens; its answer has the steps of the worker, too. "asynchronous" has the next step scheduled before
this one is over, which vLLM does on a GPU and turns off on a CPU.
"""

import json
import sys
from typing import Any

ANSWER = "ANSWER "
PREFIXES = ("vllm:spec_decode_num_", "vllm:num_preemption")


def counters(llm: Any) -> dict[str, list[int]]:
    """vLLM's counters of drafting and of preemptions by their short names, as lists."""
    found = {}
    for metric in llm.get_metrics():
        if metric.name.startswith(PREFIXES):
            values = metric.values if hasattr(metric, "values") else [metric.value]
            found[metric.name.removeprefix("vllm:").removeprefix("spec_decode_num_")] = [int(value) for value in values]
    return found


def run_round(llm: Any, plan: dict[str, Any]) -> dict[str, Any]:
    """Decode one round's prompts together."""
    from vllm import SamplingParams

    before = counters(llm)
    llm.collective_rpc("plant", args=(plan.get("fault"),))
    prompts = [{"prompt_token_ids": ids} for ids in plan["prompts"]]
    steps = None
    if "arrivals" in plan:
        llm.collective_rpc("record")
        outputs = run_steps(llm, prompts, plan)
        steps = llm.collective_rpc("recorded")[0]
    else:
        outputs = llm.generate(prompts, SamplingParams(**plan["sampling"]), use_tqdm=False)
    findings = llm.collective_rpc("findings")
    llm.collective_rpc("plant", args=(None,))
    after = counters(llm)
    return {
        "steps": steps,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "findings": findings,
        "cached": [output.num_cached_tokens or 0 for output in outputs],
        "counters": {
            name: [new - old for new, old in zip(values, before.get(name, [0] * len(values)), strict=True)]
            for name, values in after.items()
        },
    }


def run_steps(llm: Any, prompts: list[dict[str, Any]], plan: dict[str, Any]) -> list[Any]:
    """Decode prompts that come and go, each at its own time."""
    from vllm import SamplingParams

    engine, finished, num_steps = llm.llm_engine, {}, 0
    waiting = list(enumerate(zip(prompts, plan["arrivals"], plan["lengths"], strict=True)))
    while waiting or engine.has_unfinished_requests():
        for i, (prompt, arrival, length) in list(waiting):
            if arrival <= num_steps:
                sampling = SamplingParams(**plan["sampling"] | {"max_tokens": length})
                engine.add_request(f"row-{i}", prompt, sampling)
                waiting.remove((i, (prompt, arrival, length)))
        finished |= {output.request_id: output for output in engine.step() if output.finished}
        num_steps += 1
    return [finished[f"row-{i}"] for i in range(len(prompts))]


def keep_asynchronous() -> None:
    """Undo what vLLM decides for a CPU alone."""
    from vllm.platforms import current_platform

    platform: Any = type(current_platform)
    decide = platform.check_and_update_config

    def check_and_update_config(config: Any) -> None:
        decide(config)
        config.scheduler_config.async_scheduling = True

    platform.check_and_update_config = staticmethod(check_and_update_config)


def main() -> None:
    """Read the plan, run it, print what came of it."""
    from vllm import LLM

    plan = json.load(sys.stdin)
    if plan.get("asynchronous"):
        keep_asynchronous()
    llm = LLM(worker_extension_cls="tests.vllm.worker.Worker", disable_log_stats=False, **plan["engine"])
    rounds = [run_round(llm, one) for one in plan["rounds"]]
    facts = llm.collective_rpc("facts") if plan["engine"].get("speculative_config") else None
    print(ANSWER + json.dumps({"rounds": rounds, "facts": facts}), flush=True)


if __name__ == "__main__":
    main()
