"""Fine-tune a Gemma 2: python scripts/finetune.py MODEL DATA.jsonl --out FOLDER

A line of DATA is {"text": ...} or {"messages": [...]}; of a conversation the loss is on the replies only. FOLDER gets
`adapter` (LoRA, a PEFT folder) or `model` (full, a folder of safetensors), `training.json` and `curve.png`. While the
run goes on it also holds `state.pt`: after a kill, the same command with --resume goes on from there, and every loss is
to the bit what it would have been. docs/training.md has more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import finetune_state
import torch
from finetune_data import Example, batch, examples, read_records
from finetune_settings import Settings, add_options, read_settings
from finetune_state import Progress
from torch import Tensor, nn
from tqdm import tqdm

import gemma2
from gemma2.atomic import check_space, replacing
from gemma2.errors import NonFiniteError, first_line
from gemma2.evaluate.identity import fingerprint
from gemma2.load import parse_device
from gemma2.losses import cross_entropy
from gemma2.pictures.drawing import check_drawing, figure
from gemma2.pictures.drawing import save as save_picture
from gemma2.recompute import recomputed

STATE, LOG, CURVE, ADAPTER, MODEL = finetune_state.NAME, "training.json", "curve.png", "adapter", "model"
REDRAW = 60  # seconds between two curves while the run goes on
OWN = (STATE, LOG, CURVE, ADAPTER, MODEL)


class Training:
    """A model, what of it is trained, and how far that is."""

    def __init__(self, gemma: gemma2.Gemma, settings: Settings, total: int) -> None:
        self.gemma, self.settings, self.total = gemma, settings, total
        self.model, self.device = gemma.model, gemma.model.device
        torch.manual_seed(settings.seed)
        self.around = with_lora(gemma.model, settings) if settings.method == "lora" else None
        self.trained = [(name, p) for name, p in gemma.model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for _, p in self.trained if p.ndim > 1], "weight_decay": settings.decay},
            {"params": [p for _, p in self.trained if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.rate)
        self.progress = Progress()

    def loss(self, rows: Sequence[Example]) -> Tensor:
        """The sum over the targets of some rows, in nats."""
        tokens, positions, targets = batch(rows, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.autocast):
            return cross_entropy(self.model, self.model.model(tokens, positions), targets, reduction="sum")

    def gradient(self, rows: Sequence[Example]) -> tuple[float, float]:
        """The mean loss over the targets of a step's rows, and the norm of its gradient, which is then clipped."""
        count, loss = sum(sum(row.counts) for row in rows), 0.0
        self.optimizer.zero_grad()
        for start in range(0, len(rows), self.settings.batch):
            part = self.loss(rows[start : start + self.settings.batch]) / count
            part.backward()
            loss += part.item()
        clip = self.settings.clip or math.inf
        return loss, nn.utils.clip_grad_norm_([p for _, p in self.trained], clip).item()

    def update(self) -> None:
        step = self.progress.step
        scale = min(1.0, (step + 1) / self.settings.warmup) if self.settings.warmup else 1.0
        if self.settings.schedule == "linear":
            scale *= (self.total - step) / self.total
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * scale
        self.optimizer.step()

    @torch.no_grad()
    def held_out(self, rows: Sequence[Example]) -> float:
        """Nats a target, over all of them."""
        self.model.eval()
        some = range(0, len(rows), self.settings.batch)
        loss = sum(self.loss(rows[start : start + self.settings.batch]).item() for start in some)
        self.model.train()
        return loss / sum(sum(row.counts) for row in rows)


def with_lora(model: gemma2.Gemma2, settings: Settings) -> Any:
    """PEFT's layers around the linears that the settings name. Raises ImportError, ValueError."""
    try:
        import peft
    except ImportError:
        raise ImportError("LoRA is trained by PEFT, which is not installed: pip install peft") from None
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
    )
    try:
        return peft.get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"targets {settings.targets}: PEFT does not take them ({first_line(error)})") from None


def rows_of(step: int, rows: Sequence[Example], settings: Settings) -> list[Example]:
    """The rows of a step: in each epoch all of them, in an order of its own that the seed gives."""
    size = settings.batch * settings.accumulate
    epoch, place = divmod(step, math.ceil(len(rows) / size))
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    order = torch.randperm(len(rows), generator=generator)[place * size : (place + 1) * size]
    return [rows[i] for i in order.tolist()]


def train(run: Training, rows: Sequence[Example], held: Sequence[Example], out: Path, about: dict[str, Any]) -> None:
    """Raises NonFiniteError where a loss or a gradient is not finite; that step changes nothing. The loss of the last
    step's rows is computed once more at the end, with the weights that this step made."""
    settings, done, start = run.settings, run.progress, run.progress.step
    saved, drawn = start or None, time.monotonic()
    run.model.train()
    with (
        recomputed(run.model) if settings.recompute else contextlib.nullcontext(),
        tqdm(total=run.total, initial=start, desc="steps", disable=None) as bar,
    ):
        for step in range(start, run.total + 1):
            due = step % settings.evaluate_every == 0 or step == run.total
            if held and due and all(at != step for at, _ in done.held_out):
                loss = run.held_out(held)
                if not math.isfinite(loss):
                    raise NonFiniteError(_stopped(step, f"after step {step}: the held-out loss is {loss}", saved, out))
                done.held_out.append((step, loss))
            if step == run.total:
                break
            random = finetune_state.random_state(run.device)
            loss, norm = run.gradient(rows_of(step, rows, settings))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradients is {norm}"
                raise NonFiniteError(_stopped(step, f"step {step + 1}: {what}", saved, out))
            # A state is written only now, when its weights have given a finite loss.
            if step > start and step % settings.save_every == 0:
                finetune_state.save(out / STATE, about, done, run.trained, run.optimizer, random)
                saved = step
                write_log(out, about, done, picture=time.monotonic() - drawn > REDRAW)
                drawn = time.monotonic() if time.monotonic() - drawn > REDRAW else drawn
            run.update()
            done.losses.append(loss)
            done.step = step + 1
            held_out = f", held out {done.held_out[-1][1]:.3f}" if held else ""
            bar.set_postfix_str(f"loss {loss:.3f}{held_out}")
            bar.update()
    # No step has seen the weights that the last one made.
    loss = run.held_out(rows_of(run.total - 1, rows, settings))
    if not math.isfinite(loss) or not all(bool(values.isfinite().all()) for _, values in run.trained):
        what = "weights are not finite" if math.isfinite(loss) else f"the loss is {loss}"
        raise NonFiniteError(_stopped(run.total, f"after step {run.total}: {what}", saved, out))


def _stopped(step: int, what: str, saved: int | None, out: Path) -> str:
    """A line about a run that stops before step `step`, counted from 0, has changed anything."""
    kept = "no state was written before"
    if saved is not None:
        kept = f"{out / STATE} holds the state after step {saved}, of which --finish writes the result"
    cure = "--rate or --clip is too high" if step else "the weights or --dtype are the cause, not the training"
    return f"{what}; stopped, and {kept} ({cure})"


def write_log(out: Path, about: dict[str, Any], progress: Progress, picture: bool = True, **more: Any) -> None:
    """training.json, and the curve."""
    content = {**about, "losses": progress.losses, "held_out": progress.held_out, **more}
    with replacing(out / LOG) as (partial,):
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if picture:
        draw(progress, out / CURVE)


def draw(progress: Progress, path: Path) -> None:
    """The loss of every step, its running mean, and the held-out loss."""
    drawn = figure(7, 4)
    axes, losses = drawn.subplots(), progress.losses
    over = max(1, len(losses) // 20)
    means = [statistics.fmean(losses[max(0, i + 1 - over) : i + 1]) for i in range(len(losses))]
    axes.plot(losses, color="#c9d6e2" if over > 1 else "#35648c", lw=1, label="rows of each step")
    if over > 1:
        axes.plot(means, color="#35648c", label=f"mean over {over} steps")
    if progress.held_out:
        axes.plot(*zip(*progress.held_out, strict=True), color="#c0392b", marker="o", ms=3, label="held-out file")
    axes.set(xlabel="steps done", ylabel="loss (nats per target)", title="Loss while fine-tuning")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    save_picture(drawn, path, force=True)


def write_result(run: Training, out: Path, source: str) -> Path:
    """What was trained, for this package, transformers and others."""
    if run.around is None:
        return gemma2.save(run.gemma, out / MODEL, force=True, progress=False).path
    stated = run.around.peft_config["default"]
    stated.task_type, stated.base_model_name_or_path = "CAUSAL_LM", source
    with replacing(out / ADAPTER, folder=True) as (partial,):
        run.around.save_pretrained(str(partial), save_embedding_layers=False)  # else PEFT asks the hub about the base
    return out / ADAPTER


def check_out(out: Path, resume: bool, force: bool) -> None:
    """Raises OSError where the folder holds something that would be lost or mixed up."""
    inside = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out.absolute().parent}: no such folder to write to")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: is a file; name a folder")
    if resume:
        return
    foreign = [name for name in inside if name not in OWN and not name.startswith(".")]
    if foreign:
        raise FileExistsError(f"{out}: also holds {', '.join(foreign[:3])}; choose another folder")
    if any(name in OWN for name in inside) and not force:
        unfinished = "an unfinished run: --resume goes on, --force begins anew" if STATE in inside else ""
        raise FileExistsError(f"{out}: holds {unfinished or 'an earlier run; --force begins anew'}")


def all_rows(name: Path, gemma: gemma2.Gemma, settings: Settings, records: list[Any]) -> list[Example]:
    """The rows of a file, with a line about them. Raises ValueError that names a line."""
    context = gemma.config.max_position_embeddings
    if settings.length > context:
        raise ValueError(f"--length {settings.length:,} is beyond the model's context of {context:,}")
    made = examples(records, gemma.tokenizer, settings.length, long=settings.long, system=settings.system)
    each = list(tqdm(made, total=len(records), desc=name.name, disable=None, leave=False))
    rows = [row for some in each for row in some]
    ids, learned = sum(len(row.ids) - 1 for row in rows), sum(sum(row.counts) for row in rows)
    split, cut = sum(len(some) > 1 for some in each), sum(row.cut for row in rows)
    changed = [f"{number} of them {how}" for number, how in ((split, "split"), (cut, "cut")) if number]
    lines = ", ".join([f"{len(each)} lines", *changed, f"{len(rows)} rows"])
    print(f"{name}: {lines}, {ids:,} token ids, of which {learned:,} are learned")
    return rows


def run(args: argparse.Namespace) -> None:
    settings, out = read_settings(args), args.out
    check_out(out, args.resume or args.finish, args.force)
    check_drawing()
    state = finetune_state.load(out / STATE) if args.resume or args.finish else None
    records = read_records(args.data)
    held_records = read_records(args.held_out) if args.held_out else []
    device = parse_device(args.device)
    gemma = gemma2.load(args.model, device=device, dtype=settings.dtype, weights=settings.weights)
    rows = all_rows(args.data, gemma, settings, records)
    held = all_rows(args.held_out, gemma, settings, held_records) if held_records else []
    each = math.ceil(len(rows) / (settings.batch * settings.accumulate))
    total = settings.steps or settings.epochs * each
    about = {
        "model": fingerprint(gemma),
        "data": finetune_state.digest(args.data),
        "held-out file": finetune_state.digest(args.held_out) if args.held_out else None,
        "settings": asdict(settings),
        "versions": finetune_state.versions(device),
    }
    training = Training(gemma, settings, total)
    size = sum(values.numel() for _, values in training.trained)
    print(f"{settings.method}: {size:,} parameters are trained; {total} steps, {each} an epoch", flush=True)
    if state is not None:
        for note in finetune_state.check_same(state, about, out / STATE, free=("save_every",)):
            print(f"note: {note}")
        training.progress = finetune_state.restore(state, training.trained, training.optimizer)
        finetune_state.set_random_state(state["random"], device)
        print(f"going on after step {training.progress.step}", flush=True)
    out.mkdir(exist_ok=True)
    for name in OWN if state is None else ():  # of an earlier run
        old = out / name
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    check_space(out, 8 * sum(values.nbytes for _, values in training.trained))  # two states, and the result
    try:
        if not args.finish:
            train(training, rows, held, out, about)
    except NonFiniteError as error:
        write_log(out, about, training.progress, stopped=str(error))
        raise
    result = write_result(training, out, str(args.model))
    write_log(out, about, training.progress, result=result.name)
    (out / STATE).unlink(missing_ok=True)
    print(f"{result}, {out / LOG} and {out / CURVE} were written")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="pocket, a hub name, a folder, or a file")
    parser.add_argument("data", type=Path, metavar="DATA", help="a JSONL file")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the result goes; required")
    parser.add_argument("--held-out", type=Path, metavar="FILE", help="a JSONL file that is measured, not trained on")
    parser.add_argument("--device", metavar="D", help="cuda, mps or cpu; default: the best present")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true", help="go on from FOLDER/state.pt")
    begin.add_argument("--finish", action="store_true", help="write the result of FOLDER/state.pt, and train no more")
    begin.add_argument("--force", action="store_true", help="begin anew where FOLDER holds an earlier run")
    add_options(parser)
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError, ImportError, NonFiniteError) as error:
        raise SystemExit(f"finetune: error: {error}") from None
    except KeyboardInterrupt:
        kept = "--resume goes on from the last state" if (args.out / STATE).exists() else "no state was written before"
        raise SystemExit(f"finetune: interrupted; {kept}") from None


if __name__ == "__main__":
    main()
