"""GPT, a Transformer that writes text (Radford et al., 2019, "Language Models are Unsupervised
Multitask Learners"; the Transformer is Vaswani et al., 2017, arXiv:1706.03762).

    p(x_1, ..., x_T) = prod_t p(x_t | x_1, ..., x_{t-1})     x_t: a character, or a part of a word

Training minimizes the mean of -log p(x_t | x_1, ..., x_{t-1}), the cross-entropy in nats per
token. Writing draws x_t from this distribution, again and again.

    python gpt.py train                              a small model from scratch: tiny Shakespeare
    python gpt.py train --text my.txt --init gpt2    OpenAI's GPT-2, trained further on your text
    python gpt.py train --resume runs/gpt-my         go on after a stop, or beyond the end
    torchrun --nproc-per-node=8 gpt.py train ...     on eight GPUs
    python gpt.py generate --prompt "Yesterday I went to the"           by OpenAI's GPT-2
    python gpt.py generate --model runs/gpt-tinyshakespeare             by a model of your own

The algorithm is the first section, BPETokenizer, and train_step in train; the rest is speed and
files. A run's folder holds the best model as the Hugging Face hub keeps it, so
transformers can load it. Q3.1, Q3.2 and Q3.3 are the questions of the University of Amsterdam's
Deep Learning Practical 3 (2023). Shapes: B texts in a batch, T tokens in each, S keys and values,
C = n_embd, H heads, V tokens in the vocabulary.
"""

import argparse
import codecs
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
import unicodedata
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common

# -- The model and sampling -------------------------------------------------------------------
# Attention, the layers around it, and how a next token is drawn from what they compute.


@dataclasses.dataclass
class GPTConfig:
    vocab_size: int  # V
    block_size: int  # the longest sequence, in tokens
    n_layer: int
    n_head: int  # H
    n_embd: int  # C
    dropout: float = 0.0
    fused: bool = True  # attention by torch's fused kernel, or by the formula
    eos_token_id: int | list | None = None  # the token that ends a text, or several
    bos_token_id: int | None = None  # the token that starts a text


def attention(q, k, v, mask=None, dropout_p=0.0, fused=True):
    """softmax(q k^T / sqrt(C / H)) v, scaled dot-product attention (Vaswani et al., equation 1).
    Training uses torch's fused kernel for it, unless --plain-attention is given. Give this flag if
    you change the formula below; the saved model remembers it (GPTConfig.fused).

    q: [B, H, T, C / H]; k and v: [B, H, S, C / H] -> [B, H, T, C / H]. mask: boolean [T, S], True
    where a token may look; None: each looks at itself and all before it (T = S).

    A score sums C / H products, so its variance grows with C / H. Without the division, softmax
    would give nearly all weight to one token. Q3.1, the challenge of long texts: time and memory
    grow with T * S, the length squared. A fused kernel saves the memory: it never holds all T * S
    scores (Dao et al., 2022, arXiv:2205.14135). But time stays quadratic. If tokens attend only to
    the last W, time grows with T * W, and what is further away comes only through the layers
    (Beltagy et al., 2020, arXiv:2004.05150). Q3.2, the steps: scores, mask, softmax, dropout, sum.
    """
    if not fused:
        if mask is None:
            mask = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).tril()
        q = q / math.sqrt(q.size(-1))  # before the product, which could overflow in float16
        scores = q @ k.mT  # [B, H, T, S]
        scores = scores.masked_fill(~mask, -math.inf)
        weights = F.dropout(F.softmax(scores, dim=-1), dropout_p)
        return weights @ v
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=mask is None)


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention: a token looks at itself and the tokens before it."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.fused = config.n_head, config.fused
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask=None, positions=None, cache=None):
        """x: [B, T, C] -> [B, T, C]. mask: see attention. cache: [2, B, H, S, C / H], keys and
        values to look at. Those of x are written into it, at positions [T]."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # [3, B, H, T, C / H]
        q, k, v = qkv
        if cache is not None:
            cache.index_copy_(-2, positions, torch.stack([k, v]).to(cache.dtype))
            k, v = cache  # [B, H, S, C / H] each
        y = attention(q, k, v, mask, self.dropout.p if self.training else 0.0, self.fused)
        return self.dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # [B, T, 4 C]
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, positions=None, cache=None):
        x = x + self.attn(self.ln_1(x), mask, positions, cache)
        return x + self.mlp(self.ln_2(x))


def next_token(logits, do_sample=True, temperature=1.0, top_k=None, top_p=1.0):
    """Choose the next token of each row (Q3.3). logits [B, V] -> tokens [B, 1]

    Without do_sample, or at temperature 0, it is the most probable. Else it is drawn from
    softmax(logits / temperature), restricted to the top_k most probable tokens (None or 0: all),
    then to the fewest whose probabilities sum to top_p or more (Holtzman et al., arXiv:1904.09751).
    """
    if not do_sample or temperature < 1e-6:
        return logits.argmax(dim=-1, keepdim=True)
    logits, V = logits.float() / temperature, logits.size(-1)
    ids = torch.arange(V, device=logits.device).expand_as(logits)
    if top_k or top_p < 1:  # topk sorts: the most probable come first
        logits, ids = logits.topk(min(top_k or V, V))
    probs = F.softmax(logits, dim=-1)
    if top_p < 1:
        mass = probs.cumsum(dim=-1)
        probs[:, 1:][mass[:, :-1] >= top_p] = 0  # multinomial divides by the sum
    if probs.device.type == "mps":  # torch.multinomial draws wrong values there
        probs = probs.cpu()
    choice = torch.multinomial(probs, num_samples=1)  # [B, 1]
    return ids.gather(-1, choice.to(ids.device))


class GPT(nn.Module):
    """Parameters are named as in the public GPT-2 checkpoints."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # of tokens
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # of positions
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        # Normal, as in OpenAI's code; the matrices that end the 2 n_layer residual branches are
        # divided by sqrt(2 n_layer), as in the paper.
        for name, parameter in self.named_parameters():
            if name.endswith(".weight") and parameter.dim() == 2:
                std = 0.01 if name == "wpe.weight" else 0.02
                if name.endswith("c_proj.weight"):
                    std /= math.sqrt(2 * config.n_layer)
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @classmethod
    def from_pretrained(cls, name, **changes):
        """A trained model in evaluation mode, in float32, on the CPU; see load_model."""
        return load_model(name, cls, **changes)

    def hidden(self, idx, positions=None, cache=None):
        """Run tokens idx [B, T] through all layers. -> [B, T, C]. positions: [T] (None: 0, 1, ...).
        cache: [n_layer, 2, B, H, S, C / H]; keys and values of idx are written into it."""
        T, mask = idx.size(1), None  # None: each token looks at itself and those before it
        assert 0 < T <= self.config.block_size, f"{T} tokens, of at most {self.config.block_size}"
        positions = torch.arange(T, device=idx.device) if positions is None else positions
        if cache is not None:  # it is read whole: later positions, also empty ones, are masked
            mask = torch.arange(cache.size(-2), device=idx.device) <= positions[:, None]  # [T, S]
        x = self.dropout(self.wte(idx) + self.wpe(positions))  # [B, T, C]
        for i, block in enumerate(self.h):
            x = block(x, mask, positions, None if cache is None else cache[i])
        return self.ln_f(x)

    def logits(self, x):
        """[..., C] -> logits [..., V]. The output layer's matrix is the tokens' embedding. (If you
        use another here, name the layer lm_head, as files do.)"""
        return F.linear(x, self.wte.weight)

    def forward(self, idx, targets=None):
        """idx: tokens [B, T] -> logits [B, T, V] of the token that follows each, and the loss:
        the mean cross-entropy with `targets` [B, T], in nats per token (None without targets)"""
        logits = self.logits(self.hidden(idx))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    @torch.inference_mode()
    def stream(self, idx, n, record=None, **sampling):
        """Continue idx [B, T] with n tokens, yielded one by one as [B, 1]. The model sees the last
        block_size tokens. record(step), such as common.cuda_graph, returns a faster step; sampling:
        see next_token."""
        assert not self.training, "call eval() first: dropout is for training"
        config, S = self.config, min(idx.size(1) + n, self.config.block_size)
        # Without a cache each new token would cost a pass over the whole text. The cache keeps the
        # keys and values of all tokens so far, in each layer: they never change, because no token
        # looks at later ones. Once the window slides, all its tokens have new positions, so each
        # token costs a whole pass. (Zeros, because weight 0 * nan is nan.)
        cache = torch.zeros(
            config.n_layer, 2, len(idx), config.n_head, S, config.n_embd // config.n_head,
            dtype=self.wte.weight.dtype, device=idx.device)

        def step(idx, positions):
            return self.logits(self.hidden(idx, positions, cache)[:, -1])  # [B, V]

        step = record(step) if record else step
        for i in range(n):
            window = idx[:, -config.block_size:]
            # Only the last token is new, unless the cache is empty or the window slides.
            new = 1 if i > 0 and idx.size(1) <= config.block_size else window.size(1)
            positions = torch.arange(window.size(1), device=idx.device)
            token = next_token(step(window[:, -new:], positions[-new:]), **sampling)
            yield token
            idx = torch.cat([idx, token], dim=1)

    def generate(self, idx, n, **sampling):
        """As stream, all at once. -> [B, T + n]"""
        return torch.cat([idx, *self.stream(idx, n, **sampling)], dim=1)


# -- Characters and text ----------------------------------------------------------------------
# From a text's file to batches of tokens and the mean loss on them. train calls this.

# Unicode's \s. Python's own white space has four control characters more.
WHITE_SPACE = ("\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008"
               "\u2009\u200a\u2028\u2029\u202f\u205f\u3000")


@contextlib.contextmanager
def user_errors(subject, kinds=ValueError):
    """Errors of these kinds in a block become a common.UserError, one line that names subject."""
    try:
        yield
    except kinds as error:
        reason = f"{type(error).__name__}: {error}".removeprefix("ValueError: ")
        raise common.UserError(f"{subject}: {' '.join(reason.split())[:300]}") from error


class CharTokenizer:
    """A token for each character of the string `characters`. Methods as those of BPETokenizer."""

    merges, special, end_of_text = (), {}, None

    def __init__(self, characters):
        self.characters = characters
        self.vocab = {character: id for id, character in enumerate(characters)}
        self.start = self.vocab.get("\n", 0)

    def __len__(self):
        return len(self.characters)

    def encode(self, text):
        if unknown := sorted(set(text) - self.vocab.keys()):
            raise ValueError(f"no token for {len(unknown):,} characters: {''.join(unknown[:20])!r}")
        return [self.vocab[character] for character in text]

    def stream(self, ids):
        for id in ids:
            yield self.characters[id] if id < len(self.characters) else "\ufffd"

    def decode(self, ids):
        return "".join(self.stream(ids))

    def save(self, folder):
        common.write_json(Path(folder, "vocab.json"), self.vocab)


def start_token(config, tokenizer):
    """The token that starts a text without a prompt: the model's, or else the tokenizer's"""
    start = config.bos_token_id
    return start if start in range(config.vocab_size) else tokenizer.start


def fetch(url, path):
    """Download a file, whole or not at all, if it is not there yet. Raises OSError if it fails."""
    if path.exists():
        return
    print(f"downloading {url}", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(url, timeout=15) as answer, tqdm.wrapattr(
            answer, "read", answer.length, disable=None, leave=False) as source:
        def write(file):
            shutil.copyfileobj(source, file)
            if answer.length:  # read() counts down from the announced length
                raise ConnectionError(f"{answer.length:,} bytes of {url} did not come")
        common.save(path, write)


def find_text(data_dir):
    """-> the path of tiny Shakespeare, or of Python's documentation if the download fails"""
    url = "https://github.com/karpathy/char-rnn/raw/master/data/tinyshakespeare/input.txt"
    path = Path(data_dir, "tinyshakespeare.txt")
    try:
        fetch(url, path)
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        from pydoc_data.topics import topics

        print(f"warning: {error}: this run learns Python's documentation", file=sys.stderr)
        path = path.with_name("python-topics.txt")
        if not path.exists():
            common.save(path, lambda file: file.write("\n".join(topics.values()).encode("utf-8")))
    return path


def read_blocks(path, limit, size=2**20):
    """Yield the first `limit` characters of a text (None: all) in blocks of about `size`.

    In a token of BPETokenizer no white space follows what is none. So blocks that end before white
    space, all of it, have the tokens of the whole text. ("\n\n" is one token, and is not cut.)
    """
    rest, left = "", limit or sys.maxsize
    with open(path, encoding="utf-8-sig", newline="") as file:
        while new := file.read(min(size, left)):
            left -= len(new)
            text = rest + new
            last_space = max(text.rfind("\n"), text.rfind(" "))  # -1 if there is none
            end = len(text[:last_space + 1].rstrip(WHITE_SPACE))
            yield text[:end]
            rest = text[end:]
    yield rest


def tokenize(path, limit, tokenizer, folder, announce=True):
    """The tokens of a text, int32 [N]. They are in a file in `folder`. It is written once, then
    read in parts, as they are used, so there may be more tokens than the memory holds."""
    status = os.stat(path)
    made_from = repr([path, status.st_size, status.st_mtime_ns, limit, tokenizer.vocab,
                      tokenizer.merges, tokenizer.special])
    token_file = Path(folder, f"tokens-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.bin")
    if not token_file.exists():
        token_file.parent.mkdir(parents=True, exist_ok=True)
        blocks = read_blocks(path, limit)
        if any(re.search(r"\S\s", text) for text in tokenizer.special):
            blocks = ["".join(blocks)]  # or a special token could be cut at its white space
        blocks = tqdm(blocks, "tokenizing", unit=" blocks", delay=1, leave=False, disable=None)
        common.save(token_file, lambda file: file.writelines(
            np.array(tokenizer.encode(block), np.int32) for block in blocks))
    elif announce:
        print(f"{token_file}: used again. Delete it if you changed read_blocks.", file=sys.stderr)
    return np.memmap(token_file, np.int32, "r")


def windows(tokens, starts, length):
    """The `length` tokens from each of `starts` on. -> int64 [len(starts), length]"""
    return torch.from_numpy(tokens[starts[:, None] + np.arange(length)].astype(np.int64))


@torch.no_grad()
def evaluate(model, tokens, T, batch_size):
    """The mean cross-entropy, in nats per token, over `tokens` in windows of T, one after another.
    (The last tokens may fill no window. If there is none at all, there is a shorter one.)"""
    device, T = model.wte.weight.device, min(T, len(tokens) - 1)
    starts = np.arange(0, len(tokens) - T, T)
    total = 0  # becomes a tensor on the device, which is read once
    for some in np.split(starts, range(batch_size, len(starts), batch_size)):
        batch = windows(tokens, some, T + 1).to(device)
        total += model(batch[:, :-1], batch[:, 1:])[1] * len(some)
    return total.item() / len(starts)


# -- The train command ------------------------------------------------------------------------
# One function, from the flags to the last line that is printed.


def train(argv):
    """The `train` command; under torchrun each process runs it."""
    # -- Arguments, device and processes ------------------------------------------------------
    parser = argparse.ArgumentParser(
        prog="gpt.py", usage="gpt.py train [options]", description="Learn a text.",
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, number = parser.add_argument, common.number
    add("--text", type=common.absolute_path, metavar="FILE", help="UTF-8 (None: tiny Shakespeare)")
    add("--tokenizer", default="char", metavar="char|NAME|DIR", help="characters, or a model's")
    add("--init", metavar="NAME|DIR", help="a model to train further, see generate --model. It "
        "sets the size and the tokenizer, and changes defaults: --block-size 256 --batch-size 4 "
        "--max-steps 100 --eval-every 25 --optimizer adamw --lr 5e-5")
    add("--n-layer", type=number(int, 1), default=4, help="layers")
    add("--n-head", type=number(int, 1), default=4, help="attention heads in each layer")
    add("--n-embd", type=number(int, 1), default=128, help="the embedding's size")
    add("--block-size", type=number(int, 1), default=64, help="tokens that the model sees at once")
    add("--batch-size", type=number(int, 1), default=8, help="sequences per step")
    add("--grad-accum", type=number(int, 1), default=1, help="parts of a batch, to save memory")
    add("--max-steps", type=number(int, 1), default=3000, help="steps in all")
    add("--eval-every", type=number(int, 1), default=600, help="steps between evaluations")
    add("--dropout", type=number(float, 0, 1), default=0.0, help="share that is dropped")
    add("--optimizer", choices=["muon", "adamw"], default="muon", help="muon: for matrices")
    add("--lr", type=number(float, 0), help="highest rate (None: 0.9 / n-embd; adamw 0.4 / n-embd)")
    add("--plain-attention", action="store_true", help="by the formula, not by the fused kernel")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile: slow, then fast")
    common.add_run_flags(parser)  # --limit --seed --device --no-amp --data-dir --out-dir --resume
    if parser.parse_known_args(argv)[0].init:
        parser.set_defaults(n_layer=None, n_head=None, n_embd=None, tokenizer=None, block_size=256,
                            batch_size=4, max_steps=100, eval_every=25, optimizer="adamw", lr=5e-5)
    # With --resume, args are the run's, and checkpoint what its last.pt holds; else it is None.
    args, checkpoint = common.parse_args(parser, argv, may_change={
        "text", "max_steps", "eval_every", "lr", "grad_accum", "compile"})
    if args.init and any([args.n_layer, args.n_head, args.n_embd, args.tokenizer]):
        raise common.UserError("leave out --n-... and --tokenizer: the --init model sets them")
    if not args.init and args.n_embd % args.n_head:
        raise common.UserError("--n-embd is not a multiple of --n-head")
    device, dtype = common.pick_device(args.device, amp=not args.no_amp)
    if device.type == "cuda" and dtype == torch.float32 and not args.no_amp:
        dtype = torch.float16  # a card without bfloat16
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    part_size, remainder = divmod(args.batch_size, args.grad_accum * world_size)
    if remainder:
        raise common.UserError("--batch-size is not a multiple of --grad-accum times processes")
    if world_size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(local_rank)
        # Others wait while the first process downloads and tokenizes: it may take hours.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(days=1))

    # -- Text, tokenizer and model ------------------------------------------------------------
    # The first process of a machine prepares files, up to its barrier below. Others wait here.
    if local_rank > 0:
        dist.barrier()
    args.text = args.text or str(find_text(args.data_dir))
    torch.manual_seed(args.seed)
    with user_errors(args.text):
        source = args.resume or args.init or args.tokenizer
        if source == "char":
            characters = map(set, read_blocks(args.text, args.limit))
            tokenizer = CharTokenizer("".join(sorted(set().union(*characters))))
        else:
            tokenizer = load_tokenizer(source)
        tokens = tokenize(args.text, args.limit, tokenizer, args.data_dir, local_rank == 0)
    if checkpoint:
        model = GPT(GPTConfig(**checkpoint["config"]))
    elif args.init:
        model = GPT.from_pretrained(args.init, dropout=args.dropout, fused=not args.plain_attention)
    else:
        multiple = 1 if args.tokenizer == "char" else 64  # GPUs like a rounded vocab_size
        model = GPT(GPTConfig(
            vocab_size=multiple * math.ceil(len(tokenizer) / multiple), block_size=args.block_size,
            n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, dropout=args.dropout,
            fused=not args.plain_attention, eos_token_id=tokenizer.end_of_text,
            bos_token_id=tokenizer.start))
    # All three ways to a model meet here. Change it here (freeze weights by requires_grad_(False),
    # add LoRA's matrices, which save_model has to get merged, W + B A): a resumed run is then
    # changed, too, and gets its weights below.
    if world_size > 1 and local_rank == 0:
        dist.barrier()
    model.to(device)
    T = args.block_size = min(args.block_size, model.config.block_size)
    split = int(0.9 * len(tokens))
    train_tokens, val_tokens = tokens[:split], tokens[split:][:2**20]
    if len(train_tokens) <= T or len(val_tokens) < 2:
        raise common.UserError(f"{args.text} is too short for --block-size {T}")
    if getattr(args, "num_tokens", len(tokens)) != len(tokens):  # of a resumed run
        raise common.UserError(f"{args.text} has other tokens than when the run began")
    args.num_tokens = len(tokens)

    # -- Optimizers ---------------------------------------------------------------------------
    # Each parameter is in one of these: the layers' matrices; the other matrices, here embeddings;
    # and all that is left, without weight decay. Muon and AdamW skip what is frozen.
    matrices = [p for p in model.h.parameters() if p.dim() == 2]
    embeddings = [p for p in model.parameters() if p.dim() == 2 and p not in set(matrices)]
    others = [p for p in model.parameters() if p.dim() != 2]
    muon = args.optimizer == "muon"
    if args.lr is None:
        args.lr = (0.9 if muon else 0.4) / model.config.n_embd
    # common.cuda_graph needs the rate in a tensor, which the loop below fills, and capturable=True.
    lr = torch.zeros((), device=device)
    optimizers = [torch.optim.AdamW(
        [{"params": embeddings if muon else embeddings + matrices},
         {"params": others, "weight_decay": 0.0}], lr, betas=(0.9, 0.99), weight_decay=0.1,
        fused=True, capturable=True)]
    if muon:  # its usual momentum is 0.95, but then the validation loss ends 0.006 higher
        optimizers.append(common.Muon(matrices, lr, weight_decay=0.1, momentum=0.9))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    rows, done = [], 0  # the results, one dict per evaluation, and the number of steps
    if checkpoint:
        rows, done = checkpoint["rows"], checkpoint["step"]
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
            for group in optimizer.param_groups:
                group["lr"] = lr  # load_state_dict has replaced it
        if checkpoint["scaler"]:  # empty after training without float16
            scaler.load_state_dict(checkpoint["scaler"])
    name = f"gpt-{Path(args.text).stem}"
    if rank == 0:
        run = Path(args.resume or common.new_run_folder(args.out_dir or f"runs/{name}"))
        common.write_json(run / "args.json", vars(args), indent=2)
        if not checkpoint:
            tokenizer.save(run)
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {world_size} x "
              f"{device}, {dtype}\n{len(train_tokens):,} train, {len(val_tokens):,} val tokens, "
              f"{args.batch_size} x {T} a step\n{done:,} of {args.max_steps:,} steps done; "
              f"after a stop: --resume {run}", flush=True)

    # -- Training -----------------------------------------------------------------------------
    net = model  # or wrapped: compiled, or averaging the gradients of all processes
    if args.compile:
        net = torch.compile(net, dynamic=False)
    if world_size > 1:
        net = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)

    # If you change this step: on one GPU its Python runs for the first batches, then only
    # recorded GPU work is repeated, with new dropout. Python numbers and branches stay the same,
    # lists get nothing more. What changes must be a tensor that is set by fill_ or copy_.
    def train_step(batch):  # [B / world_size, T + 1]
        loss = torch.zeros((), device=device)
        for i, part in enumerate(batch.split(part_size), 1):
            # Processes average their gradients in backward(), but only in the last part's.
            average = world_size == 1 or i == args.grad_accum
            with contextlib.nullcontext() if average else net.no_sync():
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    part_loss = net(part[:, :-1], part[:, 1:])[1] / args.grad_accum
                scaler.scale(part_loss).backward()
            loss += part_loss.detach()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            # If any gradient overflowed in float16, no optimizer may step: clipping by an infinite
            # norm has spoiled all gradients. (scaler.step would check each optimizer alone.)
            if not scaler.is_enabled() or norm.isfinite():
                optimizer.step()
            optimizer.zero_grad()
        scaler.update()
        return loss

    # A scaler reads values back to the CPU, so its steps cannot be recorded.
    if device.type == "cuda" and world_size == 1 and not scaler.is_enabled():
        train_step = common.cuda_graph(train_step)
    offset, golden_ratio = random.Random(args.seed).random(), (1 + 5**0.5) / 2  # for the windows
    evaluations = [*range(0, args.max_steps, args.eval_every), args.max_steps]
    for end in [step for step in evaluations if step > done]:
        # A resumed run draws the same dropout. (A tuple of integers always has the same hash.)
        torch.manual_seed(hash((args.seed, done, rank)))
        began, steps = time.perf_counter(), end - done
        model.train()
        loss_sum = torch.zeros((), device=device)
        for step in tqdm(range(done, end), f"to {end}", leave=False, disable=rank > 0 or None):
            # Up in the first hundredth of all steps, then down to 0
            progress = (step + 0.5) / args.max_steps
            lr.fill_(args.lr * min(progress / 0.01, (1 - progress) / 0.99))
            # Window n begins at this fraction of the text. The fractions fill 0..1 evenly (Weyl,
            # 1916): as many tokens as the text has are 86 to 89% of it (63% if windows are random).
            n = np.arange(step * args.batch_size, (step + 1) * args.batch_size)
            fractions = (offset + n * golden_ratio) % 1
            starts = (fractions * (len(train_tokens) - T)).astype(np.int64)
            starts = np.split(starts, world_size)[rank]  # this process's share
            batch = windows(train_tokens, starts, T + 1)
            if device.type == "cuda":
                batch = batch.pin_memory()  # or the copy would wait for the device
            loss_sum += train_step(batch.to(device, non_blocking=True))
            done = step + 1  # so a checkpoint that you save here is resumed here
        if world_size > 1:
            dist.all_reduce(loss_sum)
        train_loss = loss_sum.item() / world_size / steps  # waits for the device
        seconds = time.perf_counter() - began
        if rank > 0:
            continue
        model.eval()
        val_loss = evaluate(model, val_tokens, T, part_size)
        tokens_per_s = steps * args.batch_size * T / seconds
        rows.append({"step": done, "seconds": seconds, "tokens_per_s": tokens_per_s,
                     "lr": lr.item(), "train_loss": train_loss, "val_loss": val_loss})
        common.check_finite(model, rows[-1])
        if val_loss == min(r["val_loss"] for r in rows):  # the best so far
            save_model(model, run)
        common.write_json(run / "metrics.jsonl", *rows)
        common.save_checkpoint(run / "last.pt", {
            "step": done, "model": model.state_dict(), "scaler": scaler.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "config": dataclasses.asdict(model.config), "args": vars(args), "rows": rows})
        print(f"step {done:5d}/{args.max_steps} | train {train_loss:.4f} | val {val_loss:.4f} nats "
              f"| {tokens_per_s / 1000:.1f}k tok/s | {seconds:.1f} s", flush=True)
        torch.manual_seed(0)  # the same draws each time, so that samples can be compared
        start = torch.tensor([[start_token(model.config, tokenizer)]], device=device)
        sample = model.generate(start, 200, top_k=40)
        text = tokenizer.decode(sample[0, 1:].tolist()).replace("\n", "\n    ")
        print(f"    {text}", flush=True)
        common.save_curves(run / "loss.png", rows, ["train_loss", "val_loss"],
                           "cross-entropy, nats per token", x="step")

    if rank == 0:
        best = min(rows, key=lambda row: row["val_loss"])
        print(f"{name}: best at step {best['step']}, val {best['val_loss']:.4f} -> {run}")
    if world_size > 1:
        dist.destroy_process_group()


# -- The generate command ---------------------------------------------------------------------
# One function, too; its model and tokenizer come from the section on the hub's files.


def generate(argv):
    """The `generate` command: texts to standard output, all else to standard error."""
    parser = argparse.ArgumentParser(
        prog="gpt.py", usage="gpt.py generate [options]", description="Continue a prompt.",
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, number = parser.add_argument, common.number
    add("--model", default="gpt2", metavar="NAME|DIR", help="gpt2, gpt2-medium, gpt2-large, "
        "gpt2-xl, distilgpt2 or OWNER/NAME on the Hugging Face hub, or a folder, such as a run's")
    add("--prompt", default="", metavar="TEXT", help="best without a space at its end")
    add("--num-samples", type=number(int, 1), default=1, help="texts, made as one batch")
    add("--max-new-tokens", type=number(int, 1), default=200, help="tokens at most in each")
    add("--greedy", action="store_true", help="always the most probable token")
    add("--temperature", type=number(float, 0), default=1.0, help="0: greedy; high: surprising")
    add("--top-k", type=number(int, 0), default=40, help="draw from the k most probable; 0: all")
    add("--top-p", type=number(float, 0, 1), default=1.0, help="of these the fewest that sum to it")
    add("--half", action="store_true", help="in float16: half the memory; slow on many CPUs")
    add("--seed", type=number(int, 0), default=42, help="another seed, another text")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="cuda, else cpu")
    args = parser.parse_args(argv)
    device, _ = common.pick_device(args.device, amp=False)
    torch.set_float32_matmul_precision("highest")  # no TF32
    model = GPT.from_pretrained(args.model).to(device, torch.half if args.half else torch.float)
    tokenizer = load_tokenizer(args.model)
    prompt = args.prompt.removeprefix("\ufeff")  # the byte-order mark of a text file
    with user_errors("--prompt"):
        ids = tokenizer.encode(prompt) or [start_token(model.config, tokenizer)]
    if len(ids) > (room := model.config.block_size):
        print(f"the model sees the last {room:,} tokens of {len(ids):,}", file=sys.stderr)
    ends = np.ravel(model.config.eos_token_id).tolist()  # several, one or [None]
    idx = torch.tensor([ids], device=device).expand(args.num_samples, -1)
    torch.manual_seed(args.seed)
    tokens = model.stream(
        idx, args.max_new_tokens, record=common.cuda_graph if device.type == "cuda" else None,
        do_sample=not args.greedy, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    if args.num_samples == 1:
        rows = [(token.item() for token in tokens)]  # each is printed as it comes
    else:
        rows = torch.cat([*tqdm(tokens, total=args.max_new_tokens, disable=None)], dim=1).tolist()
    for i, row in enumerate(rows):
        print("---\n" if i else "", prompt, sep="", end="", flush=True)
        for text in tokenizer.stream(itertools.takewhile(lambda id: id not in ends, row)):
            print(text, end="", flush=True)
        print()


# -- Byte-pair encoding -----------------------------------------------------------------------
# The tokenizer of GPT-2. load_tokenizer makes it for --init and --tokenizer NAME.


@functools.cache
def word_pattern():
    r"""How GPT-2 splits a text into words, numbers, other characters and white space:

    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

    with Unicode's letters, \p{L}, and numbers, \p{N}, written out: Python's re has neither.
    """
    classes = dict.fromkeys("CLMNPSZ", "")  # by Unicode's kinds of characters
    characters = map(chr, range(sys.maxunicode + 1))
    for kind, span in itertools.groupby(characters, lambda c: unicodedata.category(c)[0]):
        span = list(span)
        classes[kind] += f"{re.escape(span[0])}-{re.escape(span[-1])}"
    letter, number, space = classes["L"], classes["N"], re.escape(WHITE_SPACE)
    return re.compile(f"'(?:[sdmt]|ll|ve|re)| ?[{letter}]+| ?[{number}]+"
                      f"| ?[^{space}{letter}{number}]+|[{space}]+(?![^{space}])|[{space}]+")


class BPETokenizer:
    """GPT-2's byte-level byte-pair encoding (Sennrich et al., 2016, arXiv:1508.07909).

    A text is split into words, and a word into its UTF-8 bytes, a token each. Then, again and
    again, the pair of neighbours that is earliest in a list of 50,000 is merged into one token,
    everywhere in the word. So GPT-2's five steps for " lower" are (with _ for the space)

        _ l o w e r -> _ l o w er -> _ l ow er -> _l ow er -> _l ower -> _lower

    because e r is pair 8 of its list, o w 45, _ l 67, ow er 534 and _l ower 2,538. Special tokens,
    such as <|endoftext|>, are never split.
    vocab: {token: id}; merges: [(left, right), ...]; special: {text: id}. In vocab and merges a
    byte is written as a character that can be seen: its own, or one from U+0100 on.
    """

    def __init__(self, vocab, merges, special):
        visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
        others = itertools.count(256)
        alphabet = [chr(byte if byte in visible else next(others)) for byte in range(256)]
        byte_of = {character: byte for byte, character in enumerate(alphabet)}

        end = {text: vocab[text] for text in ["<|endoftext|>"] if text in vocab}
        self.vocab, self.merges, self.special = vocab, merges, special | end
        self.byte_ids = [vocab[character] for character in alphabet]
        self.end_of_text = self.special.get("<|endoftext|>")
        self.start = self.special.get("<|endoftext|>", self.byte_ids[ord("\n")])  # without a prompt
        triples = [(vocab[left], vocab[right], vocab[left + right]) for left, right in merges]
        # (left, right) -> (rank, left, right, merged), all of them ids
        self.ranks = {triple[:2]: (rank, *triple) for rank, triple in enumerate(triples)}
        self.bytes_of = {id: bytes(byte_of[character] for character in token)
                         for token, id in vocab.items() if token not in self.special}
        self.bytes_of |= {id: text.encode("utf-8") for text, id in self.special.items()}
        texts = sorted(self.special, key=len, reverse=True)  # of two that match, the longer
        self.special_pattern = re.compile(f"({'|'.join(map(re.escape, texts)) or '(?!)'})")
        self.known = {}  # words that were met before, and their ids

    def __len__(self):
        return max(self.bytes_of) + 1

    def encode_word(self, word):
        """word -> list of ids"""
        ids = [self.byte_ids[byte] for byte in word.encode("utf-8")]
        while found := [self.ranks[pair] for pair in itertools.pairwise(ids) if pair in self.ranks]:
            _, left, right, merged = min(found)  # the lowest rank
            joined = []
            for id in ids:
                if id == right and joined and joined[-1] == left:
                    joined[-1] = merged
                else:
                    joined.append(id)
            ids = joined
        return ids

    def encode(self, text):
        ids = []
        for part in self.special_pattern.split(text):
            if part in self.special:
                ids.append(self.special[part])
                continue
            for word in word_pattern().findall(part):
                if word not in self.known:
                    self.known[word] = self.encode_word(word)
                ids += self.known[word]
        if len(self.known) > 2**20:  # a bound on the memory
            self.known.clear()
        return ids

    def stream(self, ids):
        """Yield the text of each of `ids` as it comes. Part of a character waits for the rest;
        invalid UTF-8 or an unknown id becomes U+FFFD."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for id in ids:
            yield decoder.decode(self.bytes_of.get(id, b"\xff"))
        yield decoder.decode(b"", final=True)

    def decode(self, ids):
        return "".join(self.stream(ids))

    def save(self, folder):
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in self.merges), ""]
        common.write_json(Path(folder, "vocab.json"), self.vocab)
        common.write_json(Path(folder, "added_tokens.json"), self.special)
        common.save(Path(folder, "merges.txt"), lambda file: file.write("\n".join(lines).encode()))


# -- The Hugging Face hub's files -------------------------------------------------------------
# train and generate call load_tokenizer, save_model and load_model (as GPT.from_pretrained).

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # it names several files
# Every model has a config.json. It is downloaded last: if it is there, the others were tried.
SMALL_FILES = ("generation_config.json", "special_tokens_map.json", "added_tokens.json",
               "vocab.json", "merges.txt", "tokenizer.json", "config.json")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
          "BOOL": torch.bool}  # as safetensors names them
# Settings of a config.json that change what a model computes, and the values that gpt.py knows, the
# default first. Other values would give wrong texts.
MODEL_SETTINGS = {
    "model_type": ["gpt2"], "layer_norm_epsilon": [1e-5], "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"]}  # both are the same
# The same of the parts of a tokenizer.json: other values would give other ids.
TOKENIZER_SETTINGS = {
    "normalizer": {"type": [None]},
    "pre_tokenizer": {"type": ["ByteLevel"], "add_prefix_space": [False], "use_regex": [True]},
    "post_processor": {"type": [None, "ByteLevel", "TemplateProcessing"], "special_tokens": [{}]},
    "model": {"type": ["BPE"], "dropout": [None, 0], "continuing_subword_prefix": [None, ""],
              "end_of_word_suffix": [None, ""], "byte_fallback": [False], "ignore_merges": [False]},
    "added token": {"single_word": [False], "lstrip": [False], "rstrip": [False]}}


def check_settings(settings, known, where):
    for name, values in known.items():
        if settings.get(name, values[0]) not in values:
            raise ValueError(f"{where}: gpt.py knows no {name} {settings[name]!r}")


def read_json(path, optional=False):
    if optional and not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8-sig"))  # sig: skips a byte-order mark


def read_config(folder):
    """config.json -> GPTConfig. Raises common.UserError for a model that gpt.py cannot compute."""
    with user_errors(folder, Exception):
        saved = read_json(folder / "config.json")
        check_settings(saved, MODEL_SETTINGS, "config.json")
        saved["block_size"] = saved["n_positions"]
        saved |= read_json(folder / "generation_config.json", optional=True)  # its start and end
        names = [field.name for field in dataclasses.fields(GPTConfig)]
        return GPTConfig(**{name: saved[name] for name in names if name in saved})


def weight_files(folder):
    """-> the paths of the weights: one file, or all that an index names"""
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    return [folder / name for name in sorted(set(read_json(folder / INDEX)["weight_map"].values()))]


def find_model(name, weights=True):
    """-> the folder of a model: `name` itself, or a download of NAME or OWNER/NAME from the hub"""
    if Path(name).is_dir():
        return Path(name)
    owner = "distilbert" if name == "distilgpt2" else "openai-community"
    repo = name if "/" in name else f"{owner}/{name}"
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    folder = Path(torch.hub.get_dir(), "checkpoints", repo.replace("/", "--"))

    def get(file):  # -> whether it is there now
        try:
            fetch(f"{hub}/{repo}/resolve/main/{file}", folder / file)
        except urllib.error.URLError as error:
            if getattr(error, "code", None) not in (401, 404):  # not there, or private
                raise common.UserError(f"{name} is no folder; download failed: {error}") from error
        return (folder / file).exists()

    if not (folder / "config.json").exists() and not [get(file) for file in SMALL_FILES][-1]:
        raise FileNotFoundError(f"{name} is neither a folder nor a model on {hub}")
    if weights:
        read_config(folder)  # refuses another kind of model before its gigabytes come
        if (folder / INDEX).exists() or get(WEIGHTS) or get(INDEX):
            for path in weight_files(folder):
                get(path.name)
    return folder


def load_tokenizer(name):
    """The tokenizer of a model that find_model finds. Raises common.UserError or OSError."""
    folder = find_model(name, weights=False)
    with user_errors(folder, Exception):
        if saved := read_json(folder / "tokenizer.json", optional=True):
            model, added = saved["model"], saved.get("added_tokens", [])
            for part in ("normalizer", "pre_tokenizer", "post_processor", "model"):
                check_settings(saved.get(part) or {"type": None}, TOKENIZER_SETTINGS[part], part)
            for token in added:
                check_settings(token, TOKENIZER_SETTINGS["added token"], "added token")
            merges = [p.split(" ") if isinstance(p, str) else p for p in model["merges"]]
            return BPETokenizer(model["vocab"], merges, {t["content"]: t["id"] for t in added})
        vocab = read_json(folder / "vocab.json")
        if not (folder / "merges.txt").exists() and max(map(len, vocab)) == 1:
            return CharTokenizer("".join(sorted(vocab, key=vocab.get)))
        lines = (folder / "merges.txt").read_text(encoding="utf-8-sig").split("\n")
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        special = read_json(folder / "added_tokens.json", optional=True)
        for tokens in read_json(folder / "special_tokens_map.json", optional=True).values():
            for token in tokens if isinstance(tokens, list) else [tokens]:
                text = token["content"] if isinstance(token, dict) else token
                special |= {text: vocab[text]} if text in vocab else {}
        return BPETokenizer(vocab, merges, special)


def read_tensors(path):
    """Yield (name, tensor) of one file. A .safetensors file has the header's length in 8 bytes, the
    header in JSON, and the tensors end to end; these stay in the file until they are used."""
    if not path.exists():
        raise ValueError(f"no {path.name}. (pytorch_model.bin is not read: save_pretrained of "
                         "transformers makes model.safetensors of it)")
    with open(path, "rb") as file:
        size, start = path.stat().st_size, 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8)) if start <= size else {}
    header.pop("__metadata__", None)
    if start + max((entry["data_offsets"][1] for entry in header.values()), default=0) > size:
        raise ValueError(f"{path.name} is incomplete (a git-lfs pointer needs `git lfs pull`)")
    data = np.memmap(path, np.uint8, "c", start)  # c: nothing is written to the file
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        values = torch.from_numpy(data[first:last])
        yield name, values.view(DTYPES[entry["dtype"]]).view(entry["shape"])


def load_model(name, cls=GPT, **changes):
    """A trained model that find_model finds, in evaluation mode, in float32, on the CPU. changes:
    of its GPTConfig, such as dropout=0.1. Raises common.UserError or OSError."""
    folder = find_model(name)
    model = cls(dataclasses.replace(read_config(folder), **changes))
    expected, weights = model.state_dict(), {}
    with user_errors(folder, Exception):
        for path in weight_files(folder):
            for key, tensor in read_tensors(path):
                key = key.removeprefix("transformer.")
                # GPT-2's matrices c_attn, c_proj and c_fc are [in, out], nn.Linear's [out, in].
                transposed = ".c_" in key and key.endswith(".weight")
                if key in expected or not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", key):
                    weights[key] = tensor.T if transposed else tensor  # (not the causal mask)
        if "lm_head.weight" in weights and "lm_head.weight" not in expected:
            head = weights.pop("lm_head.weight")  # a second name of wte
            if not torch.equal(head, weights.setdefault("wte.weight", head)):
                raise ValueError("lm_head.weight is not wte.weight: it needs a class with lm_head")
        model.load_state_dict(weights)  # copies the file's values, as float32
    return model.eval()


def save_model(model, folder):
    """Write config.json and model.safetensors as for transformers' GPT2LMHeadModel, in float32."""
    config, end = model.config, 0
    # If you change what the model computes, change model_type in MODEL_SETTINGS: transformers would
    # load its weights as a GPT-2's, without a word.
    settings = {name: values[0] for name, values in MODEL_SETTINGS.items()}
    common.write_json(Path(folder, "config.json"), dataclasses.asdict(config) | settings | {
        "architectures": ["GPT2LMHeadModel"], "n_positions": config.block_size,
        "tie_word_embeddings": "lm_head.weight" not in model.state_dict(),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)}, indent=2)
    header, tensors = {"__metadata__": {"format": "pt"}}, []
    for name, tensor in model.state_dict().items():
        transposed = ".c_" in name and name.endswith(".weight")  # as in load_model
        tensor = (tensor.T if transposed else tensor).float().cpu().contiguous()
        start, end = end, end + 4 * tensor.numel()
        key = name if name.startswith("lm_head.") else f"transformer.{name}"
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
        tensors.append(tensor.numpy())
    header = json.dumps(header).encode()
    common.save(Path(folder, "model.safetensors"), lambda file: file.writelines(
        [len(header).to_bytes(8, "little"), header, *tensors]))


def main(argv=None):
    argv, commands = sys.argv[1:] if argv is None else argv, {"train": train, "generate": generate}
    parser = argparse.ArgumentParser(prog="gpt.py", epilog="train --help lists its flags")
    parser.add_argument("command", choices=commands)
    commands[parser.parse_args(argv[:1]).command](argv[1:])


if __name__ == "__main__":
    common.run_script(main)
