"""Make the golden files of this directory with transformers and torch; run by maintainers, not by tests.

    python tests/golden/make_golden.py --families
    python tests/golden/make_golden.py --qwen models/qwen2.5-coder-0.5b --smollm models/smollm2-135m

The first writes `<family>/` (a tiny random checkpoint and its logits), in seconds; the second `greedy.json`
(what two real models say), in a minute or two. Both need `pip install "cacheclip-jax[torch]"`. README.md says
what the files hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

HERE = Path(__file__).parent
T = 96  # prompt rows; every EVERY-th row's logits are kept, the last one among them
EVERY = 4
DECODED = 8
NEW_TOKENS = 40
FIRST_SEED = 39  # with it decoded tokens vary, and their logits lead by 0.1 or more

TINY = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": True,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Of the eight frequencies of a 16-wide head, these settings leave one as it is, ramp two and divide five.
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

# The head dims of qwen3, llama3 and mistral differ from D / N, so that only an explicit head_dim gives the
# right shapes; mistral's epsilon is large enough to be seen in the logits.
FAMILIES: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**TINY, tie_word_embeddings=True, rope_parameters=DEFAULT_ROPE, rms_norm_eps=1e-6),
    "qwen2_untied": Qwen2Config(**TINY, tie_word_embeddings=False, rms_norm_eps=1e-6,
                                rope_parameters={**DEFAULT_ROPE, "rope_theta": 1000000.0}),
    "qwen3": Qwen3Config(**TINY, tie_word_embeddings=True, head_dim=16, rope_parameters=DEFAULT_ROPE,
                         rms_norm_eps=1e-6),
    "llama3": LlamaConfig(**TINY, tie_word_embeddings=False, head_dim=16, rope_parameters=LLAMA3_ROPE,
                          rms_norm_eps=1e-5),
    "llama_bias": LlamaConfig(**TINY, tie_word_embeddings=False, attention_bias=True, mlp_bias=True,
                              rope_parameters=DEFAULT_ROPE, rms_norm_eps=1e-5),
    # SmolLM2's G = 3 and tied embeddings.
    "smollm2": LlamaConfig(**{**TINY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6},
                           tie_word_embeddings=True, rms_norm_eps=1e-5,
                           rope_parameters={**DEFAULT_ROPE, "rope_theta": 100000.0}),
    "mistral": MistralConfig(**TINY, tie_word_embeddings=False, head_dim=16, sliding_window=None,
                             rope_parameters=DEFAULT_ROPE, rms_norm_eps=1e-2),
}
SHARDED = "llama3"

PROMPTS = [
    "What is the capital of Australia, and in which year was it founded?",
    "Summarize in one sentence: The ferry to the island was cancelled on Monday because of strong wind. On "
    "Tuesday the wind dropped, two ferries ran in the morning, and by evening every waiting passenger had "
    "crossed.",
    "Write a Python function that returns the sum of the squares of a list of numbers.",
    "List five vegetables that grow well in a cold climate.",
    "Answer the question using only the passage below.\n\nThe bakery in Lund Street was opened in 1987 by "
    "Greta Holm. It sells rye bread every day, cinnamon rolls on Friday, and a walnut cake that must be "
    "ordered two days ahead.\n\nQuestion: Who opened the bakery?\nAnswer in one short sentence.",
]


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--families", action="store_true", help="write the tiny checkpoints and their logits")
    args.add_argument("--qwen", type=Path, help="directory of Qwen2.5-Coder-0.5B-Instruct (with --smollm)")
    args.add_argument("--smollm", type=Path, help="directory of SmolLM2-135M-Instruct (with --qwen)")
    args.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    flags = args.parse_args()
    if not flags.families and not flags.qwen:
        args.error("nothing to make: give --families, or --qwen and --smollm")
    if bool(flags.qwen) != bool(flags.smollm):
        args.error("--qwen and --smollm go together: greedy.json holds both models")
    torch.set_num_threads(flags.threads)
    if flags.families:
        for seed, (name, config) in enumerate(FAMILIES.items(), FIRST_SEED):
            make_family(name, config, seed)
    if flags.qwen:
        models = {"qwen2.5-coder-0.5b": flags.qwen, "smollm2-135m": flags.smollm}
        text = json.dumps({name: greedy_answers(path) for name, path in models.items()}, indent=1)
        (HERE / "greedy.json").write_text(text + "\n", encoding="utf-8")


def make_family(name: str, config: PretrainedConfig, seed: int) -> None:
    """Write one family's random checkpoint, and the logits that transformers computes from these files."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    randomise(model)
    ids = torch.randint(0, config.vocab_size, (T,))
    model.generation_config = GenerationConfig()
    out = HERE / name
    shutil.rmtree(out, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(out, max_shard_size="40KB" if name == SHARDED else "1GB")
    (out / "generation_config.json").unlink(missing_ok=True)

    model = load(out)
    with torch.inference_mode():
        filled = model(ids[None], use_cache=True)
        prefill = filled.logits[0]
        decode_ids, decode = [], []
        for token, logits in decoded(model, prefill[-1], filled.past_key_values, DECODED):
            decode_ids.append(token)
            decode.append(logits.numpy())
    positions = np.arange(EVERY - 1, T, EVERY, dtype=np.int32)
    np.savez_compressed(out / "logits.npz", ids=ids.numpy().astype(np.int32), positions=positions,
                        prefill=prefill.numpy()[positions], decode_ids=np.array(decode_ids, np.int32),
                        decode=np.stack(decode))
    size = sum(f.stat().st_size for f in out.iterdir())
    print(f"{name}: {size / 1000:.0f} kB, logits' std {prefill.std():.2f}, decoded {decode_ids}")


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """Random weights under which a forgotten bias, norm or rotation shows far above rounding."""
    for name, p in model.named_parameters():
        x = torch.randn_like(p)
        if name.endswith("bias"):
            p.copy_(0.5 * x)
        elif p.ndim == 1:
            p.copy_(1 + 0.3 * x)
        elif "embed_tokens" in name:
            # Tied weights are the output matrix too: at full scale the last token would always win.
            p.copy_(0.3 * x if model.config.tie_word_embeddings else x)
        else:
            # Larger than 1/sqrt(in): attention neither uniform nor one-hot, and logits that vary clearly.
            p.copy_((2 if "lm_head" in name else 1.5) * x * p.shape[-1] ** -0.5)


def load(directory: Path) -> PreTrainedModel:
    """A stored model in float32 with eager attention: the arithmetic that all golden values come from."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def decoded(
    model: PreTrainedModel, last: torch.Tensor, cache, count: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """`count` greedy tokens, each with the logits that follow it; `last`: those at the prompt's end."""
    for _ in range(count):
        token = int(last.argmax())
        last = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1]
        yield token, last


def greedy_answers(directory: Path) -> dict:
    """What a real model answers to PROMPTS, greedily, without penalties, and how close its choices were."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = load(directory)
    ends = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    cases = []
    for prompt in PROMPTS:
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                             add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            filled = model(torch.tensor([ids]), use_cache=True)
            margins, output, stop = [margin(filled.logits[0, -1])], [], "length"
            for token, logits in decoded(model, filled.logits[0, -1], filled.past_key_values, NEW_TOKENS):
                if token in ends:
                    stop = "eos"
                    break
                output.append(token)
                margins.append(margin(logits))
        # Without an end token, the last margin is of a token that isn't part of the output.
        smallest = min(margins if stop == "eos" else margins[:-1])
        cases.append({"prompt": prompt, "input_ids": ids, "output_ids": output, "stop": stop,
                      "output": tokenizer.decode(output), "min_margin": round(smallest, 4)})
        print(f"{directory.name}: {len(ids)} -> {len(output)} tokens ({stop}), margin {smallest:.4f}")
    with (directory / "model.safetensors").open("rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    return {"sha256": sha256, "eos_token_ids": ends, "cases": cases}


def margin(logits: torch.Tensor) -> float:
    """The distance of the two largest logits."""
    top = logits.topk(2).values
    return float(top[0] - top[1])


if __name__ == "__main__":
    main()
