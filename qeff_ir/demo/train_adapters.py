"""Train the demo's adapters with PEFT: ``python -m qeff_ir.demo.train_adapters [--out FOLDER]``, minutes on one core.

One makes the adding model subtract the smaller number from the larger one, the other makes it name the larger one. Both
read the same questions as the base model, so that an answer tells which adapter gave it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from qeff_ir.demo import ADAPTERS_FOLDER, MODEL_FOLDER, TASKS
from qeff_ir.demo.train import BOS, EOS, IDS, PAD, Problem, split_problems

SEED = 0
BATCH = 256
REPORT_EVERY = 100
RECIPES: dict[str, dict[str, Any]] = {
    "subtract": {
        "steps": 1500,
        "rate": 4e-3,
        "config": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    },
    "larger": {
        "steps": 400,
        "rate": 3e-3,
        "config": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True},
    },
}
"""By adapter: steps, learning rate, and what is particular in its configuration."""

_IGNORED = -100


def encode(problems: Sequence[Problem], task: Callable[[int, int], int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of single questions, padded on the right; only answers carry loss."""
    ids: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    for a, b in problems:
        question = [IDS[BOS], *(IDS[c] for c in f"{a}+{b}=")]
        answer = [*(IDS[c] for c in str(task(a, b))), IDS[EOS]]
        ids.append(torch.tensor(question + answer))
        labels.append(torch.tensor([_IGNORED] * len(question) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True, padding_value=IDS[PAD]), pad(labels, batch_first=True, padding_value=_IGNORED)


@torch.inference_mode()
def accuracy(model: Any, problems: Sequence[Problem], task: Callable[[int, int], int]) -> float:
    """Share of questions that greedy decoding answers without any mistake."""
    ids, labels = encode(problems, task)
    found, wanted = model(input_ids=ids).logits.argmax(-1)[:, :-1], labels[:, 1:]
    return ((found == wanted) | (wanted == _IGNORED)).all(1).double().mean().item()


def train(name: str, out: Path) -> None:
    """Train one adapter and write it below `out`, at every report anew."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    recipe, task = RECIPES[name], TASKS[name]
    trained, held_out = split_problems(rng)
    base = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **recipe["config"]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, recipe["rate"], betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe["rate"], recipe["steps"], pct_start=0.1, cycle_momentum=False
    )
    for step in range(1, recipe["steps"] + 1):
        ids, labels = encode(rng.choices(trained, k=BATCH), task)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % REPORT_EVERY == 0 or step == recipe["steps"]:
            _save(model, out / name)
            shares = (
                f"{accuracy(model, trained, task):.2%} of trained, {accuracy(model, held_out, task):.2%} of held-out"
            )
            print(f"{name}, step {step}: loss {loss.item():.5f}, right: {shares} questions", flush=True)


def _save(model: Any, folder: Path) -> None:
    """As PEFT does, but in half precision, and with the base model named from the adapter's folder."""
    from safetensors.torch import load_file, save_file

    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    weights = folder / "adapter_model.safetensors"
    save_file({key: tensor.half() for key, tensor in load_file(weights).items()}, weights)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "../../model"
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ADAPTERS_FOLDER, help="folder to write the adapters below")
    parser.add_argument("--only", choices=sorted(RECIPES), help="train one of them")
    disable_progress_bar()
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else RECIPES:
        train(name, arguments.out)


if __name__ == "__main__":
    main()
