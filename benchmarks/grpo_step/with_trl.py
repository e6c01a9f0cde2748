"""The same step by TRL's GRPOTrainer with Hugging Face generate, one thread, offline, a model made on the spot."""

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

import contextlib
import sys
import tempfile

import cases
import datasets
import tokenizers
import torch
import transformers
import trl


def save_model(case: cases.Case, folder: str) -> transformers.PreTrainedTokenizerFast:
    """Saves random weights, because TRL loads the reference by name; returns a tokenizer of words "t0", "t1", ..."""
    words = {f"t{i}": i for i in range(case.vocabulary)} | {"<eos>": case.eos}
    words_only = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
    words_only.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    config = transformers.Qwen2Config(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        intermediate_size=case.ffn,
        tie_word_embeddings=False,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=case.eos,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words_only, pad_token="t0", eos_token="<eos>", unk_token="t0", padding_side="left"
    )


def main():
    """Prints one JSON line."""
    options = cases.arguments()
    case = cases.CASES[options.case]
    torch.set_num_threads(1)
    watch, lengths = cases.Stopwatch(), []

    def reward(completion_ids, **_):
        watch.lap()  # called once a step: from one call to the next is one whole step
        lengths.append(sum(map(len, completion_ids)))
        return [cases.reward(ids) for ids in completion_ids]

    steps = 1 + options.warm_up + options.steps
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        tokenizer = save_model(case, folder)
        texts = [" ".join(f"t{i}" for i in ids) for ids in case.prompt_ids(64)]
        arguments = trl.GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=case.prompts * case.group,
            num_generations=case.group,
            max_completion_length=case.new_tokens,
            max_steps=steps,
            beta=case.beta,
            learning_rate=case.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=case.clip_norm,
            loss_type="grpo",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = trl.GRPOTrainer(
            model=folder,
            reward_funcs=reward,
            args=arguments,
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
        )
        watch.laps.clear()
        start = cases.Stopwatch()
        trainer.train()
        start.lap()
    first = start.laps[0][1] - sum(wall for _, wall in watch.laps[1:])
    cases.report(
        "trl",
        options.case,
        watch.laps[-options.steps :],
        first,
        tokens=lengths[-1],
        versions={"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main()
