"""Train the pocket model that ships inside the package: python scripts/train_pocket.py TEXT_FOLDER

TEXT_FOLDER holds king-james-bible.txt and shakespeare.txt (public domain). The model is this project's own; only the
optimiser and the loop are here. Writes config.json, tokenizer.model, model.safetensors and training.json into --out,
and can be stopped at any time: the best weights so far are already there.

`--score` trains nothing: it prints the loss of the weights in --out on the held-out texts. `--plot PNG` draws
training.json and needs no TEXT_FOLDER.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import re
import time
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import gemma2
from gemma2.checkpoints.hf_config import configs, read_config
from gemma2.model import Gemma2

POCKET = Path(__file__).resolve().parent.parent / "gemma2" / "assets" / "pocket"
SETTINGS = configs() / "train" / "pocket.json"  # the defaults of the options below
HELD_OUT_EVERY = 20  # every 20th chapter or scene-sized passage is never trained on
DECAY_FROM = 0.25  # of the time: the learning rate is constant before, linear to nothing after
SELECTION = 24  # held-out texts that choose the weights; the reported figure is from the others
PLAY = "\n\n"  # stands between the speeches of a play, and nowhere in a chapter of the Bible


def documents(folder: Path) -> tuple[list[str], list[str]]:
    """(training, held-out) texts: a chapter of the Bible, or about 4,000 characters of a play, each."""
    bible = (folder / "king-james-bible.txt").read_text(encoding="utf-8")
    chapters = [chapter.strip() + "\n" for chapter in re.split(r"\n\n(?=[^\n]+ \d+\n)", bible)]
    passages, speeches = [], (folder / "shakespeare.txt").read_text(encoding="utf-8").split("\n\n")
    while speeches:
        passage = ""
        while speeches and len(passage) < 4000:
            passage += speeches.pop(0).strip() + "\n\n"
        passages.append(passage)
    texts = [chapters, passages]
    trained = [text for kind in texts for i, text in enumerate(kind) if i % HELD_OUT_EVERY]
    held = [text for kind in texts for text in kind[::HELD_OUT_EVERY]]
    return trained, held


def train_tokenizer(texts: list[str], size: int) -> bytes:
    """A SentencePiece model whose first 473 ids are Gemma 2's own: specials, turn tags, newline and space runs,
    HTML tags and bytes stand where Gemma 2 has them, and only the merges differ."""
    tags = ["table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td"]
    heads = [*(f"h{i}" for i in range(1, 7)), "blockquote"]
    marks = ["strong", "em", "b", "i", "u", "s", "sub", "sup", "code"]
    html = [f"<{slash}{tag}>" for group in (tags, heads, marks) for slash in ("", "/") for tag in group]
    symbols = ["<mask>", "<2mass>", "[@BOS@]", *(f"<unused{i}>" for i in range(99))]
    symbols += ["<start_of_turn>", "<end_of_turn>"]
    symbols += ["\n" * n for n in range(1, 32)] + ["\u2581" * n for n in range(2, 32)] + html
    written = io.BytesIO()
    lines = [line for text in texts for line in text.splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        model_type="bpe",
        vocab_size=size,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=symbols,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        max_sentence_length=100_000,
        num_threads=2,
        minloglevel=1,
    )
    return written.getvalue()


def initialise(model: Gemma2, generator: torch.Generator) -> None:
    """Normal(0, 0.02) as in transformers, the two matrices that write to the stream smaller with depth, norms at 1."""
    depth = (2 * model.config.num_hidden_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            std = 0.02 * (depth if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
            nn.init.normal_(parameter, std=std, generator=generator)


def batches(stream: Tensor, length: int, rows: int, bos: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows of the token stream, each behind a BOS as in use: inputs and targets [rows, length]."""
    starts = torch.randint(len(stream) - length, (rows,), generator=generator)
    targets = stream[starts[:, None] + torch.arange(length)]
    inputs = torch.cat((torch.full((rows, 1), bos), targets[:, :-1]), dim=1)
    return inputs, targets


class Objective(nn.Module):
    """Mean cross-entropy in nats a token; a module of its own so that torch.compile takes model and loss as one."""

    def __init__(self, model: Gemma2) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(inputs)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def add_dropout(model: Gemma2, rate: float) -> None:
    """Dropout on what enters the residual stream, as hooks: the model itself knows none. Active in training only."""
    ends = ("embed_tokens", "post_attention_layernorm", "post_feedforward_layernorm")
    for name, module in model.named_modules():
        if name.endswith(ends):
            module.register_forward_hook(lambda m, inputs, output: F.dropout(output, rate, m.training))


@torch.no_grad()
def held_out_loss(model: Gemma2, texts: list[list[int]], bos: int, context: int) -> tuple[float, int]:
    """(total nats, tokens) over texts, each on its own behind a BOS, cut at the context."""
    total, count = 0.0, 0
    model.eval()
    for ids in texts:
        targets = torch.tensor([ids[: context - 1]])
        inputs = torch.cat((torch.tensor([[bos]]), targets[:, :-1]), dim=1)
        logits = model(inputs).float()
        total += F.cross_entropy(logits[0], targets[0], reduction="sum").item()
        count += targets.numel()
    model.train()
    return total, count


def score(out: Path, held: list[str]) -> None:
    """Print the loss of the weights in `out`: on the texts that chose them, and on those of the reported figure."""
    gemma = gemma2.load(out, dtype="float32", device="cpu")
    pieces, bos = gemma.tokenizer, gemma.tokenizer.special["bos"]
    print("| held-out texts | texts | tokens | nats per token |\n|---|---|---|---|")
    for name, part in (("for choosing weights", held[:SELECTION]), ("for the reported loss", held[SELECTION:])):
        plays = [text for text in part if PLAY in text]
        chapters = [text for text in part if PLAY not in text]
        for kind, texts in ((name, part), (f"{name}: the Bible", chapters), (f"{name}: plays", plays)):
            ids = [[*pieces.encode(text, bos=False), pieces.special["eos"]] for text in texts]
            total, count = held_out_loss(gemma.model, ids, bos, gemma.config.max_position_embeddings)
            print(f"| {kind} | {len(texts)} | {count:,} | {total / count:.3f} |")


def save(model: Gemma2, out: Path) -> None:
    tensors = {name: tensor.detach().bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def plot(out: Path, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log = json.loads((out / "training.json").read_text(encoding="utf-8"))
    result = log["result"]
    reported = result["held_out_nats_per_token"]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*log["train"], strict=True), label="training text (running mean)", color="#9db4c8")
    label = f"the {SELECTION} held-out texts that chose the weights"
    axes.plot(*zip(*log["held_out"], strict=True), label=label, color="#c0392b", marker="o", markersize=3)
    label = f"the other held-out texts, final weights: {reported:.3f}"
    axes.plot(result["tokens_seen"] / 1e6, reported, label=label, color="black", marker="D", markersize=5, linestyle="")
    axes.set(xlabel="training tokens seen (millions)", ylabel="loss (nats per token)", title="Loss of the pocket model")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="?", metavar="TEXT_FOLDER")
    parser.add_argument("--out", type=Path, default=POCKET)
    parser.add_argument("--minutes", type=float, help="the schedule is stretched to this time")
    parser.add_argument("--steps", type=int, help="a fixed number of steps instead of --minutes")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--length", type=int, help="tokens a row; the last tenth uses the full context")
    parser.add_argument("--rate", type=float, help="Muon's rate; AdamW's is a tenth of it")
    parser.add_argument("--decay", type=float, help="Muon's weight decay")
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="only draw the curve of --out/training.json")
    parser.add_argument("--score", action="store_true", help="only print the loss of the weights in --out")
    parser.set_defaults(**json.loads(SETTINGS.read_text(encoding="utf-8")))
    args = parser.parse_args()
    if args.plot:
        return plot(args.out, args.plot)
    if args.texts is None:
        parser.error("name the folder with king-james-bible.txt and shakespeare.txt")
    if args.score:
        held = documents(args.texts)[1]
        random.Random(args.seed).shuffle(held)  # as for training
        return score(args.out, held)

    args.out.mkdir(parents=True, exist_ok=True)
    raw = json.loads(
        (POCKET / "config.json").read_text(encoding="utf-8")
    )  # a new pocket model has the shape of the present one
    config = read_config(raw)
    trained, held = documents(args.texts)
    proto = train_tokenizer(trained, config.vocab_size)
    (args.out / "tokenizer.model").write_bytes(proto)
    (args.out / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    bos, eos = pieces.bos_id(), pieces.eos_id()

    random.Random(args.seed).shuffle(trained)
    random.Random(args.seed).shuffle(held)
    stream = torch.tensor([token for text in trained for token in (bos, *pieces.encode(text), eos)])
    held_ids = [[*pieces.encode(text), eos] for text in held]
    nbytes = sum(len(text.encode()) for text in trained)
    print(
        f"{config.parameter_count:,} parameters; {len(stream):,} training tokens of {nbytes:,} bytes; {len(held)} held"
    )

    generator = torch.Generator().manual_seed(args.seed)
    model = Gemma2(config)
    initialise(model, generator)
    add_dropout(model, args.dropout)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=args.rate, weight_decay=args.decay, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=args.rate / 10, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    objective = torch.compile(Objective(model))

    log: dict[str, list[tuple[float, float]]] = {"train": [], "held_out": []}
    best, mean, seen, step, started = math.inf, 0.0, 0, 0, None
    bar = tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}")
    while True:
        clock = time.monotonic()
        started = started or clock
        done = step / args.steps if args.steps else (clock - started) / (60 * args.minutes)
        if done >= 1:
            break
        long = done > 0.9  # the last tenth sees the whole context, so that far positions are trained too
        length = config.max_position_embeddings if long else args.length
        rows = max(1, args.rows * args.length // length)
        inputs, targets = batches(stream, length, rows, bos, generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = min(1.0, (step + 1) / 100) * (1.0 if done < DECAY_FROM else max(0.02, (1 - done) / (1 - DECAY_FROM)))
        for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks, strict=True):
            group["lr"] = peak * scale
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step == 0:
            started = time.monotonic()  # compilation is not training
        seen, step = seen + inputs.numel(), step + 1
        mean = loss.item() if step == 1 else 0.98 * mean + 0.02 * loss.item()
        if step % 20 == 0:
            log["train"].append((seen / 1e6, mean))
        if step % 250 == 0:
            total, count = held_out_loss(model, held_ids[:SELECTION], bos, config.max_position_embeddings)
            log["held_out"].append((seen / 1e6, total / count))
            if total / count < best:
                best = total / count
                save(model, args.out)
            (args.out / "training.json").write_text(json.dumps(log), encoding="utf-8")
        bar.set_postfix_str(f"step {step}, {seen / 1e6:.2f} M tokens, train {mean:.3f}, held out {best:.3f}")
        bar.update(100 * done - bar.n)
    bar.close()

    last = held_out_loss(model, held_ids[:SELECTION], bos, config.max_position_embeddings)
    log["held_out"].append((seen / 1e6, last[0] / last[1]))
    if last[0] / last[1] <= best:
        save(model, args.out)
    from safetensors.torch import load_file

    model.load_state_dict(load_file(args.out / "model.safetensors"))  # the figure is that of the weights that ship
    model.bfloat16().float()
    report = held_ids[SELECTION:]
    total, count = held_out_loss(model, report, bos, config.max_position_embeddings)
    scored = sum(len(pieces.decode(ids[: config.max_position_embeddings - 1]).encode()) for ids in report)
    result = {
        "steps": step,
        "tokens_seen": seen,
        "epochs": seen / len(stream),
        "held_out_tokens": count,
        "held_out_nats_per_token": total / count,
        "held_out_bits_per_byte": total / math.log(2) / scored,
    }
    (args.out / "training.json").write_text(json.dumps({**log, "result": result}), encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
