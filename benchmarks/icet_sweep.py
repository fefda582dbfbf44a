"""How fast all exits are asked, against the sweep that anyone would write first.

    python benchmarks/icet_sweep.py transformers --prompts 16            all exits of the demo model
    python benchmarks/icet_sweep.py llamacpp --prompts 16                the same on its GGUF
    python benchmarks/icet_sweep.py llamacpp --prompts 100 --alone       12 exits x 100 prompts x 32 tokens

- transformers: ours encodes an image once for all exits, computes what stands before a prompt once per exit and image,
  and decodes up to 96 rows together; the naive sweep calls `model.generate` for one exit and one prompt at a time, and
  so encodes the image again each time.
- llamacpp: ours decodes up to 32 sequences together and copies the KV of the image; the naive sweep gives
  llama-cpp-python's own multimodal chat handler one request after another, with the mmproj of the exit.
- Both are greedy, with the same prompts, images and lengths. The naive side may be given the first few prompts of each
  exit (`--naive 1`): its time grows with their number. Encoding is counted, images are new to every cache. Loading is
  not, of models and of the naive side's encoders; ours loads the encoder of each exit while its clock runs.

Prints and keeps (benchmarks/results/icet_sweep.json) seconds, processor seconds, the machine's load, and the share of
equal responses. Per exit and image our side pays once, so its lead grows with `--prompts`. What is left is arithmetic
that both must do: four fifths of our time in transformers is matrix products over prompt and answer tokens, which no
exit shares with another.

Responses of llama.cpp differ at near ties, since it takes other kernels for a single row (`llamacpp_library`). Whether
it is that and not another prompt, position or image is measured: at the first token where two responses part, how far
apart are the two tokens in our logits (`gap`), beside how far the likeliest two are apart as a rule (`usual_gap`)?
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

from machine import machine

from artifacts.artifact import Artifact
from stages.data.images import benign_images
from stages.data.prompts import load_prompts
from stages.runtimes.runtime import Request, Response, Runtime

RESULTS = Path(__file__).parent / "results" / "icet_sweep.json"
EXITS = 12
RECIPE = {
    "recipe": 1,
    "name": "icet-sweep",
    "source": {"model": "demo:smol-llava"},
    "stages": {
        "exit": {"uses": "early-exit", "with": {"layer": EXITS}},
        "gguf": {"uses": "gguf", "needs": "exit", "with": {"type": "Q4_0"}},
    },
}


def artifacts(runs: Path) -> dict[str, Artifact]:
    """The demo model with all its exits, as a checkpoint ("exit") and as a GGUF ("gguf"); made once, then cached."""
    from pipeline.console import make_console
    from pipeline.graph import build_graph
    from pipeline.recipe import recipe_of
    from pipeline.runner import run_graph

    result = run_graph(
        build_graph(recipe_of(json.loads(json.dumps(RECIPE)), "icet_sweep")), runs, make_console(plain=True)
    )
    if result.error is not None:
        raise result.error
    return dict(result.artifacts)


def new_images(n: int, folder: Path) -> list[Path]:
    """Benign images of which one pixel is changed, so that no cache knows them."""
    import numpy as np
    from PIL import Image

    found = []
    for place, path in enumerate(benign_images("test", n, size=112)):
        pixels = np.array(Image.open(path))
        pixels[0, 0] = np.frombuffer(os.urandom(3), dtype=np.uint8)
        found.append(folder / f"{place}.png")
        Image.fromarray(pixels).save(found[-1])
    return found


def requests_of(prompts: int, images: Sequence[Path], tokens: int) -> list[Request]:
    """Every prompt at every exit, each prompt beside the same image at all of them."""
    chosen = [prompt.text for prompt in load_prompts("advbench", "test")[:prompts]]
    if len(chosen) < prompts:
        chosen += [prompt.text for prompt in load_prompts("donotanswer", "test")[: prompts - len(chosen)]]
    return [
        Request(text, images[place % len(images)], exit, tokens)
        for exit in range(1, EXITS + 1)
        for place, text in enumerate(chosen)
    ]


@dataclass
class Clock:
    """Seconds and processor seconds while it runs; it may run several times."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @contextmanager
    def runs(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu

    def figures(self, requests: int, load: float) -> dict[str, float]:
        return {**asdict(self), "requests_per_second": requests / self.seconds, "load": load}


Answer = Callable[[Sequence[Request], Clock], list[str]]


def partings(
    runtime: Runtime, requests: Sequence[Request], ours: Sequence[Response], theirs: Sequence[str]
) -> dict[str, float]:
    """How near a tie it was where responses part, in our logits."""
    import numpy as np

    gaps: list[float] = []
    usual: list[float] = []
    for request, mine, other in zip(requests, ours, theirs, strict=True):
        said, answered = runtime.tokens(mine.text), runtime.tokens(other)
        part = next((i for i, (a, b) in enumerate(zip(said, answered, strict=False)) if a != b), None)
        if part is None or tuple(said) != mine.tokens:
            continue  # the same, or one ends before the other, or the text is spelled with other tokens
        logits = runtime.logits(request, mine.text)
        gaps.append(float(logits[part, said[part]] - logits[part, answered[part]]))
        top = np.sort(logits, axis=1)[:, -2:]
        usual += (top[:, 1] - top[:, 0]).tolist()
    if not gaps:
        return {"parted": 0}
    return {
        "parted": len(gaps), "gap_median": float(np.median(gaps)), "gap_max": max(gaps),
        "usual_gap_median": float(np.median(usual)),
    }  # fmt: skip


def naive_transformers(folder: Path) -> Answer:
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)

    def one(request: Request) -> str:
        content = [{"type": "image"}, {"type": "text", "text": request.prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        assert request.image is not None
        inputs = processor(text=text, images=Image.open(request.image), return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(
                **inputs, vision_feature_layer=request.exit, do_sample=False, max_new_tokens=request.max_new_tokens
            )
        new = out[0, inputs["input_ids"].shape[1] :]
        said: str = processor.tokenizer.decode(new, skip_special_tokens=True)
        return said

    def answer(requests: Sequence[Request], clock: Clock) -> list[str]:
        with clock.runs():
            return [one(request) for request in requests]

    return answer


def naive_llamacpp(folder: Path, scratch: Path) -> Answer:
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import MTMDChatHandler

    from stages.machine import cores
    from stages.runtimes.exits import derive_exit

    for exit in range(1, EXITS + 1):
        derive_exit(folder / "mmproj.gguf", exit, scratch / f"{exit}.gguf")

    def opened(exit: int | None) -> Llama:
        handler = MTMDChatHandler(str(scratch / f"{exit}.gguf"), verbose=False, use_gpu=False)
        llama = Llama(
            str(folder / "model.gguf"), chat_handler=handler, n_ctx=1024, n_batch=1024, verbose=False,
            n_threads=cores(), n_threads_batch=cores(),
        )  # fmt: skip
        handler._init_mtmd_context(llama)  # the encoder, which it would load with the first image
        return llama

    def one(llama: Llama, request: Request) -> str:
        assert request.image is not None
        # The handler puts its marker where the template would print "<image>\n".
        content = [
            {"type": "image_url", "image_url": {"url": request.image.as_uri()}},
            {"type": "text", "text": f"\n{request.prompt}"},
        ]
        out = llama.create_chat_completion(
            [{"role": "user", "content": content}],
            temperature=0.0,
            repeat_penalty=1.0,
            max_tokens=request.max_new_tokens,
        )
        said: str = out["choices"][0]["message"]["content"]
        return said

    def answer(requests: Sequence[Request], clock: Clock) -> list[str]:
        found = []
        for exit, asked in groupby(requests, key=lambda request: request.exit):
            llama = opened(exit)
            with clock.runs():
                found += [one(llama, request) for request in asked]
            llama.close()
        return found

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtime", choices=("transformers", "llamacpp"))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--naive", type=int, help="prompts of the naive side at each exit; default: as many")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="no naive side")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    chosen = parser.parse_args()
    few = chosen.prompts if chosen.naive is None else chosen.naive
    if not 1 <= few <= chosen.prompts:
        parser.error(f"--naive must be 1 to {chosen.prompts}: both sides are asked the same")

    made = artifacts(chosen.runs_dir)
    folder = made["exit" if chosen.runtime == "transformers" else "gguf"].path
    result: dict[str, object] = {
        "runtime": chosen.runtime, "exits": EXITS, "prompts": chosen.prompts, "tokens": chosen.tokens,
        "images": chosen.images, "cores": len(os.sched_getaffinity(0)), "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "llama-cpp-python")},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        images = new_images(chosen.images, Path(scratch))
        requests = requests_of(chosen.prompts, images, chosen.tokens)
        clock, load = Clock(), os.getloadavg()[0]
        with _open(chosen.runtime, folder) as runtime:
            with clock.runs():
                said = runtime.generate(requests)
            result["ours"] = here = clock.figures(len(requests), load)
            print(
                f"ours: {len(requests)} requests in {here['seconds']:.1f} s ({here['cpu_seconds']:.1f} s of processor)"
            )
            if not chosen.alone:
                asked = requests_of(few, images, chosen.tokens)
                mine = dict(zip(requests, said, strict=True))
                result["naive_prompts"] = few
                result |= _against_naive(
                    chosen.runtime, folder, Path(scratch), asked, here, len(requests), mine, runtime
                )
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    name = f"{chosen.runtime}-{chosen.prompts}{'-alone' if chosen.alone else ''}, {result['machine']}"
    RESULTS.write_text(json.dumps({**kept, name: result}, indent=1, sort_keys=True) + "\n")


def _against_naive(
    kind: str,
    folder: Path,
    scratch: Path,
    requests: Sequence[Request],
    here: dict[str, float],
    asked: int,
    mine: dict[Request, Response],
    runtime: Runtime,
) -> dict[str, object]:
    """The naive side's time, ours (`here`, for `asked` requests) over it, and what both said."""
    answer = naive_transformers(folder) if kind == "transformers" else naive_llamacpp(folder, scratch)
    clock, load = Clock(), os.getloadavg()[0]
    theirs = answer(requests, clock)
    there = clock.figures(len(requests), load)
    ours = [mine[request] for request in requests]
    same = sum(response.text == text for response, text in zip(ours, theirs, strict=True))
    times = here["requests_per_second"] / there["requests_per_second"]
    cpu = (there["cpu_seconds"] / len(requests)) / (here["cpu_seconds"] / asked)
    print(f"naive: {len(requests)} requests in {there['seconds']:.1f} s ({there['cpu_seconds']:.1f} s of processor)")
    print(f"{times:.1f} times as fast, {cpu:.1f} by processor; {same} of {len(requests)} responses are the same")
    parted = partings(runtime, requests, ours, theirs)
    print(f"where they part: {json.dumps(parted)}")
    return {
        "naive": there, "same_responses": same / len(requests), "times_faster": times, "times_faster_cpu": cpu,
        "partings": parted,
    }  # fmt: skip


def _open(runtime: str, folder: Path) -> Runtime:
    if runtime == "llamacpp":
        from stages.runtimes.llamacpp import LlamaCppRuntime

        return LlamaCppRuntime(folder)
    from stages.runtimes.transformers import TransformersRuntime

    return TransformersRuntime(folder)


if __name__ == "__main__":
    main()
