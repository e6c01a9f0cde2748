"""The work of `work.py` by TRL, and generation by transformers; prints one JSON line."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import contextlib
import sys
import tempfile

import datasets
import torch
import transformers
import trl
import work


class Laps(transformers.TrainerCallback):
    """A lap for each step of a trainer."""

    def __init__(self, watch):
        self.watch = watch

    def on_step_end(self, *_, **__):
        """Ends the lap."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.watch.lap()


def main():
    """Measures."""
    options = work.arguments()
    if options.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model, padding_side="left")
    watch = work.Stopwatch()
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}

    if options.task.startswith("generate"):
        asked, group = work.asked(options.task)
        place = "cuda" if options.device == "gpu" else "cpu"
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
        model = model.to(place).eval()
        batch = tokenizer(asked, return_tensors="pt", padding=True).to(place)
        for seed in range(1 + options.steps):
            torch.manual_seed(seed)
            with torch.no_grad():
                out = model.generate(
                    **batch, do_sample=True, top_k=0, max_new_tokens=work.NEW_TOKENS,
                    min_new_tokens=work.NEW_TOKENS, num_return_sequences=group,
                )  # fmt: skip
            counted = int(out.shape[0] * (out.shape[1] - batch["input_ids"].shape[1]))
            watch.lap()
        return work.report("transformers", options, watch.laps[1:], tokens=counted, versions=versions)

    counted = []

    def reward(completion_ids, **_):
        counted.append(sum(map(len, completion_ids)))
        return [work.reward(ids) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        common = {
            "output_dir": folder,
            "max_steps": 1 + options.steps,
            "learning_rate": work.LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "gradient_checkpointing": False,
            "bf16": options.dtype == "bfloat16",
            "use_cpu": options.device == "cpu",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "model_init_kwargs": {"dtype": "float32"},
        }
        if options.task == "grpo":
            trainer = trl.GRPOTrainer(
                model=str(options.model),
                reward_funcs=reward,
                args=trl.GRPOConfig(
                    **common,
                    per_device_train_batch_size=work.PROMPTS * work.GROUP,
                    num_generations=work.GROUP,
                    max_completion_length=work.NEW_TOKENS,
                    generation_kwargs={"min_new_tokens": work.NEW_TOKENS},
                    beta=work.BETA,
                    loss_type="grpo",
                ),
                processing_class=tokenizer,
                train_dataset=datasets.Dataset.from_dict({"prompt": work.prompts()}),
            )
        elif options.task == "sft":
            arguments = trl.SFTConfig(
                **common, per_device_train_batch_size=work.EXAMPLES, max_length=work.LENGTH, packing=False
            )
            data = datasets.Dataset.from_dict({"text": work.texts()})
            counted.append(work.EXAMPLES * (work.LENGTH - 1))
            trainer = trl.SFTTrainer(
                model=str(options.model), args=arguments, train_dataset=data, processing_class=tokenizer
            )
        else:
            arguments = trl.DPOConfig(
                **common, per_device_train_batch_size=work.PAIRS, max_length=512, precompute_ref_log_probs=True
            )
            data = datasets.Dataset.from_list(work.pairs())
            counted.append(0)
            trainer = trl.DPOTrainer(
                model=str(options.model), args=arguments, train_dataset=data, processing_class=tokenizer
            )
        trainer.add_callback(Laps(watch))
        trainer.train()
    work.report("trl", options, watch.laps[1 : 1 + options.steps], tokens=counted[-1], versions=versions)


if __name__ == "__main__":
    main()
