"""Generation of `work.py` by llama.cpp (`xllamacpp`), all rows in parallel slots; prints one JSON line."""

import os
from importlib.metadata import version

import work
import xllamacpp


def main():
    """Measures."""
    options = work.arguments()
    prompts, group = work.asked(options.task)
    settings = xllamacpp.CommonParams()
    settings.model.path = str(options.model)
    settings.n_parallel, settings.n_ctx, settings.n_gpu_layers = len(prompts) * group, 256 * len(prompts) * group, 0
    settings.cache_prompt, settings.cache_ram_mib = False, 0  # no prompt is kept from one step to the next
    settings.verbosity = -1
    for threads in (settings.cpuparams, settings.cpuparams_batch):
        threads.n_threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    server = xllamacpp.Server(settings)
    watch, counted = work.Stopwatch(), 0
    for seed in range(1 + options.steps):
        out = server.handle_completions({
            "prompt": prompts, "n": group, "n_predict": work.NEW_TOKENS, "ignore_eos": True, "seed": seed,
            "temperature": 1.0, "samplers": ["temperature"], "cache_prompt": False,
        })  # fmt: skip
        ends = [choice["finish_reason"] for choice in out["choices"]]
        assert ends == ["length"] * len(prompts) * group, ends
        counted = work.NEW_TOKENS * len(ends)
        watch.lap()
    form = options.model.stem.rpartition(".")[2]  # of the weights: Q4_1, F32
    versions = {"xllamacpp": version("xllamacpp")}
    work.report(f"llama.cpp, {form}", options, watch.laps[1:], tokens=counted, dtype=form, versions=versions)


if __name__ == "__main__":
    main()
