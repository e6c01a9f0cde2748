"""Generation of `work.py` by llama.cpp, one completion after the other; prints one JSON line."""

from importlib.metadata import version

import llama_cpp
import work


def main():
    """Measures."""
    options = work.arguments()
    model = llama_cpp.Llama(str(options.model), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
    never = {model.token_eos(): -1e9}  # no completion ends early
    watch = work.Stopwatch()
    counted = 0
    for seed in range(1 + options.steps):
        counted = 0
        for prompt in work.prompts()[: work.PROMPTS]:
            for number in range(work.GROUP):
                out = model.create_completion(
                    prompt, max_tokens=work.NEW_TOKENS, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
                    repeat_penalty=1.0, seed=seed * work.GROUP + number, logit_bias=never,
                )  # fmt: skip
                counted += out["usage"]["completion_tokens"]
        watch.lap()
    versions = {"llama-cpp-python": version("llama-cpp-python")}
    work.report("llama.cpp", options, watch.laps[1:], tokens=counted, versions=versions)


if __name__ == "__main__":
    main()
