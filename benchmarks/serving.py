"""`serve` under load: whether every answer is its own, what broken connections cost, and how fast
it is.

    python -m benchmarks.serving --minutes=10 --out=benchmarks/results/serving.txt

50 clients ask at once, again and again, half of them hanging up in the middle. Each answer, and
what was read of each that was broken off, is compared with what `generate` makes of the same
prompt, seed and settings alone, and with what the server answers when it has nothing else to do. A
difference from the first alone comes of rounding: a program for eight texts adds floats up in
another order than one for one text. A difference from the second would be an answer that others
have changed.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai

from benchmarks import timing
from quweit_jax.data.asking import Asking
from quweit_jax.deploy.generate import generate_tokens
from quweit_jax.pretrained import folders

_PROMPTS = ("To be", "ROMEO:\n", "What is ", "Now is the winter of our discontent\n", "O ", "k")
_TEMPERATURES = (0.8, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Job:
    """A request that may come many times. offline: its text by `generate`."""

    prompt: str
    tokens: int
    seed: int
    temperature: float
    offline: str

    def options(self, model: str) -> dict:
        made = {name: getattr(self, name) for name in ("prompt", "seed", "temperature")}
        return {"model": model, "max_tokens": self.tokens, **made}


def make_jobs(model: str, count: int) -> tuple[list[Job], float]:
    """Requests and their texts, and how many tokens `generate` made of them in a
    second of this process's work."""
    found = folders.find(model)
    variables, asking = found.read(), Asking(found.tokenizer, found.prompting)
    draw, jobs, made, seconds = random.Random(0), [], 0, 0.0
    for seed in range(count):
        prompt, tokens = _PROMPTS[seed % len(_PROMPTS)], draw.randint(20, 60)
        temperature = _TEMPERATURES[seed % len(_TEMPERATURES)]
        begun = time.process_time()
        ids = list(
            generate_tokens(
                found.model,
                variables,
                asking.encode(prompt),
                tokens,
                seed=seed,
                temperature=temperature,
            )
        )
        if seed >= len(_TEMPERATURES):  # what is compiled for a temperature is compiled
            made, seconds = made + len(ids), seconds + time.process_time() - begun
        text = asking.tokenizer.decode(ids)
        jobs.append(Job(prompt, tokens, seed, temperature, text))
    return jobs, made / seconds


@contextlib.contextmanager
def served(model: str, options: list[str]) -> Iterator[tuple[int, int]]:
    """A server: (its process, its port)."""
    command = [sys.executable, "-m", "quweit_jax", "serve", f"--model={model}", "--port=0"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        place = re.search(r":(\d+)/v1", line)
        if not place:
            raise SystemExit(f"the server said {line!r}")
        yield process.pid, int(place[1])
    finally:
        process.terminate()
        if status := process.wait(60):
            print(f"the server ended with status {status}")


def resident(pid: int) -> float:
    """The MiB of memory that a process has."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) / 1024


def cpu_seconds(pid: int) -> float:
    """The seconds that a process has worked, on all cores together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Load:
    """Clients of one server. counts: what has happened so far."""

    def __init__(self, model: str, port: int):
        self.model = model
        url = f"http://127.0.0.1:{port}/v1"
        self.client = openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0, timeout=300)
        self.counts: collections.Counter[str] = collections.Counter()
        self.idle: dict[Job, str] = {}

    async def whole(self, job: Job) -> str:
        """An answer to its end."""
        found = await self.client.completions.create(**job.options(self.model))
        if found.choices[0].finish_reason is None or found.usage.completion_tokens != job.tokens:
            self.counts["lost"] += 1
        return found.choices[0].text

    async def streamed(self, job: Job, most: int | None = None) -> str:
        """An answer in pieces, broken off after some."""
        stream = await self.client.completions.create(**job.options(self.model), stream=True)
        text, pieces, finish = "", 0, None
        async for piece in stream:
            text += piece.choices[0].text
            pieces, finish = pieces + 1, piece.choices[0].finish_reason
            if pieces == most:
                break
        await stream.close()
        if most is None and finish is None:
            self.counts["lost"] += 1
        return text

    async def one(self, job: Job, draw: random.Random, leaves: bool) -> None:
        """An answer, compared."""
        try:
            if leaves:
                found = await self.streamed(job, draw.randint(1, job.tokens - 5))
            else:
                found = await (self.whole(job) if draw.random() < 0.5 else self.streamed(job))
        except openai.RateLimitError:
            self.counts["refused"] += 1
            return
        except openai.OpenAIError as error:
            self.counts["lost"] += 1
            print(f"lost: {error!r}", flush=True)
            return
        self.counts["broken" if leaves else "answers"] += 1
        self.counts["tokens"] += len(found)  # of a model of characters
        size = len(found) if leaves else None
        self.counts["not as offline"] += found != job.offline[:size]
        self.counts["not as idle"] += found != self.idle[job][:size]

    async def clients(self, count: int, leaving: int, jobs: list[Job], seconds: float) -> float:
        """So many, of which some leave, for a time; the seconds it took."""
        begun = time.monotonic()

        async def client(number: int) -> None:
            draw = random.Random(number)
            while time.monotonic() - begun < seconds:
                await self.one(draw.choice(jobs), draw, number < leaving)

        await asyncio.gather(*map(client, range(count)))
        return time.monotonic() - begun

    async def breaks(self, count: int, jobs: list[Job]) -> None:
        """So many connections that break after a piece or a few, 25 at a time."""
        draw = random.Random(1)

        async def several(share: int) -> None:
            for _ in range(share):
                job = draw.choice(jobs)
                found = await self.streamed(job, draw.randint(1, 4))
                self.counts["not as idle"] += found != self.idle[job][: len(found)]

        await asyncio.gather(*(several(len(range(i, count, 25))) for i in range(25)))


async def measure(args, jobs: list[Job], pid: int, port: int) -> list[str]:
    load = Load(args.model, port)
    for job in jobs:
        load.idle[job] = await load.whole(job)
    rounded = sum(load.idle[job] != job.offline for job in jobs)
    lines = [f"{len(jobs)} requests alone: {rounded} answered otherwise than by generate", ""]
    lines += ["clients  tokens a second  a CPU second of the server"]
    for count in (1, 8, args.clients):
        before, worked = load.counts["tokens"], cpu_seconds(pid)
        seconds = await load.clients(count, 0, jobs, args.seconds)
        made, worked = load.counts["tokens"] - before, cpu_seconds(pid) - worked
        lines.append(f"{count:>7}  {made / seconds:>15,.0f}  {made / worked:>26,.0f}")
    before = resident(pid)
    await load.breaks(args.broken, jobs)
    await asyncio.sleep(1)
    after = resident(pid)
    lines += ["", f"memory before {args.broken} broken connections {before:.1f} MiB, after them "]
    lines[-1] += f"{after:.1f} MiB"
    load.counts.clear()
    leaving = args.clients // 2
    seconds = await load.clients(args.clients, leaving, jobs, args.minutes * 60)
    counts = load.counts
    lines += [
        "",
        f"{args.clients} clients, {leaving} of them hanging up, for {seconds / 60:.1f} minutes:",
        f"answers {counts['answers']:,}, broken off {counts['broken']:,}, tokens read "
        f"{counts['tokens']:,}",
        f"lost {counts['lost']}, refused {counts['refused']}, changed by others "
        f"{counts['not as idle']}, otherwise than by generate {counts['not as offline']}",
        f"memory after it {resident(pid):.1f} MiB",
    ]
    await load.client.close()
    return lines


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--model", default="shakespeare-lookup")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seconds", type=float, default=20, help="of each measure of speed")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--broken", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=60, help="different requests")
    parser.add_argument("--slots", type=int, default=8)
    args = parser.parse_args()
    busy = f"load of the machine before: {os.getloadavg()[0]:.1f}"
    jobs, speed = make_jobs(args.model, args.jobs)
    with served(args.model, [f"--slots={args.slots}"]) as (pid, port):
        lines = [
            timing.machine(),
            f"wall clock; server and clients on the same cores; {busy}",
            f"{args.model}, {args.slots} slots; generate makes {speed:,.0f} tokens a CPU second, "
            "a text at a time, its start included",
            *asyncio.run(measure(args, jobs, pid, port)),
        ]
    print("\n".join(lines))
    timing.write(args.out, lines)


if __name__ == "__main__":
    main()
