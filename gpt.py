"""GPT, a Transformer that writes text (Radford et al., 2019, "Language Models are Unsupervised
Multitask Learners"; the Transformer is Vaswani et al., 2017, arXiv:1706.03762).

    A text is a sequence of tokens x_1, ..., x_T: characters, or parts of words.

    p(x_1, ..., x_T) = prod_t p(x_t | x_1, ..., x_{t-1})

    Training minimises the mean of -log p(x_t | x_1, ..., x_{t-1}), the cross-entropy in nats per
    token. Writing draws x_t from this distribution, again and again.

    python gpt.py train                  a small model from scratch, on tiny Shakespeare
    python gpt.py train --init gpt2 --text my.txt
                                         OpenAI's GPT-2, trained further on a text of yours
    torchrun --nproc-per-node=8 gpt.py train --text my.txt --tokenizer gpt2 --size gpt2 ...
                                         a model of GPT-2's size from scratch, on eight GPUs
    python gpt.py generate --prompt "Yesterday I went to the" --num-samples 10
                                         ten texts by OpenAI's GPT-2
    python gpt.py generate --model runs/gpt-tinyshakespeare --prompt "ROMEO:"
                                         a text by a model that `train` made

A run's folder holds its best model in the layout of the Hugging Face hub (config.json,
model.safetensors, vocab.json, merges.txt), so transformers can load it; and args.json,
metrics.jsonl, last.pt to resume from, loss.png, test.json (of the best validation: there is no test
set) and samples. The text's tokens are kept beside the folder, for the next run.

Q3.1, Q3.2 and Q3.3 in comments answer questions of the University of Amsterdam's Deep Learning
Practical 3 (2023). In comments on shapes B is the batch, T the sequence, S the positions that a
query may look at, C the embedding, H the heads and V the vocabulary.
"""

import argparse
import codecs
import collections
import contextlib
import dataclasses
import functools
import hashlib
import heapq
import io
import itertools
import json
import math
import mmap
import numbers
import os
import random
import re
import shlex
import shutil
import sys
import tempfile
import textwrap
import time
import unicodedata
import urllib.request
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common

# -- The model --------------------------------------------------------------------------------


@dataclasses.dataclass
class GPTConfig:
    vocab_size: int  # V
    block_size: int  # the longest sequence, in tokens
    n_layer: int
    n_head: int  # H
    n_embd: int  # C
    dropout: float = 0.0
    fused: bool = True  # attention by torch's fused kernel, not by attention() below
    eos_token_id: int | None = None  # the token that ends a text
    padded_vocab_size: int = 0  # in training: a multiple of 64 is faster on a GPU. 0: vocab_size

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            size = getattr(self, name)
            if not isinstance(size, numbers.Integral) or size < 1:
                raise ValueError(f"{name} {size!r} is not a whole number above 0")
            setattr(self, name, int(size))  # also numpy's integers
        if not isinstance(self.eos_token_id, numbers.Integral | None):
            raise ValueError(f"eos_token_id {self.eos_token_id!r} is not a token's number")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")


SIZES = {  # n_layer, n_head, n_embd: of OpenAI, Gopher, nanoGPT and minGPT
    "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600), "gopher-44m": (8, 16, 512), "gpt-baby": (6, 6, 384),
    "gpt-mini": (6, 6, 192), "gpt-micro": (4, 4, 128), "gpt-nano": (3, 3, 48),
}


def attention(q, k, v, mask, dropout_p=0.0):
    """Scaled dot-product attention, softmax(q k^T / sqrt(C / H)) v (Vaswani et al., equation 1).

    q: [B, H, T, C / H]; k and v: [B, H, S, C / H]; mask: boolean [T, S], True where a query may
    look. -> [B, H, T, C / H]
    """
    # Q3.1, the cost of long sequences: time and memory grow with T * S, the length squared. Fused
    # kernels compute the same piece by piece, and never hold all T * S scores (Dao et al., 2022,
    # arXiv:2205.14135). Q3.2, the steps: scores, mask, softmax, dropout, weighted sum.
    q = q / math.sqrt(q.size(-1))  # before the product, which could overflow in float16
    scores = q @ k.transpose(-2, -1)  # [B, H, T, S]
    scores = scores.masked_fill(~mask, -math.inf)
    weights = F.dropout(F.softmax(scores, dim=-1), dropout_p)
    return weights @ v


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention: position t looks at the positions up to t."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.fused = config.n_head, config.fused
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, start=0):
        """x: [B, T, C] -> [B, T, C]

        cache: [2, B, H, room, C / H], with the keys and values of the first `start` positions, to
        which those of x are added. x is then a whole window (start = 0) or one position (T = 1).
        """
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # [3, B, H, T, C / H]
        q, k, v = qkv
        if cache is not None:
            assert start == 0 or T == 1
            cache[:, :, :, start:start + T] = qkv[1:]
            k, v = cache[:, :, :, :start + T]  # [B, H, S, C / H]
        dropout_p = self.dropout.p if self.training else 0.0
        if self.fused:
            # A single query is the last position, and may look at all others.
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=T > 1)
        else:
            S = k.size(2)
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
            y = attention(q, k, v, mask, dropout_p)
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

    def forward(self, x, cache=None, start=0):
        x = x + self.attn(self.ln_1(x), cache, start)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Parameters are named as in the public GPT-2 checkpoints. The output layer has none of its
    own: its matrix is wte, the embedding of the tokens."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # Not nn.Embedding(...), which draws values: the "meta" device takes seconds for this.
        wte = torch.empty(config.padded_vocab_size or config.vocab_size, config.n_embd)
        wpe = torch.empty(config.block_size, config.n_embd)
        self.wte = nn.Embedding.from_pretrained(wte, freeze=False)
        self.wpe = nn.Embedding.from_pretrained(wpe, freeze=False)
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        if wte.is_meta:  # tensors on "meta" have a shape, and no values
            return
        # Normal, as in OpenAI's code; the matrices that end the 2 n_layer residual branches are
        # divided by sqrt(2 n_layer), as in the paper.
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = 0.01 if name == "wpe.weight" else 0.02
                if name.endswith("c_proj.weight"):
                    std /= math.sqrt(2 * config.n_layer)
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, idx, cache=None, start=0):
        """Run tokens idx [B, T], the first of which is at position `start`, through all layers and
        the last LayerNorm. -> [B, T, C]. cache: [n_layer, 2, B, H, room, C / H]"""
        end, block_size = start + idx.size(1), self.config.block_size
        assert 0 < end <= block_size, f"{end} tokens, of at most {block_size}"
        x = self.wte(idx) + self.wpe.weight[start:end]  # [B, T, C]
        x = self.dropout(x).to(self.h[0].ln_1.weight.dtype)  # only the layers may be in 16 bits
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[i], start)
        return self.ln_f(x.to(self.ln_f.weight.dtype))

    def logits(self, x):
        """[..., C] -> [..., V]"""
        return F.linear(x, self.wte.weight)[..., :self.config.vocab_size]

    def forward(self, idx, targets=None):
        """idx: tokens [B, T] -> logits [B, T, V] of the tokens that follow each of them, and the
        loss: their mean cross-entropy with `targets` [B, T], in nats per token, or None."""
        logits = self.logits(self.hidden(idx))
        if targets is None:
            return logits, None
        # For a model in 16 bits (under autocast cross_entropy does so itself): bfloat16 has steps
        # of 0.03 near a loss of 5.
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits, F.cross_entropy(precise.flatten(0, 1), targets.flatten())

    def generate(self, idx, max_new_tokens, *, do_sample=True, temperature=1.0, top_k=None,
                 top_p=None, stop_token=None, generator=None):
        """Continue idx [B, T], of which the model sees the last block_size tokens.

        See `next_token` for how tokens are chosen. After `stop_token` a row repeats it.
        -> [B, T + max_new_tokens]. Raises ValueError for an empty or one-dimensional idx.
        """
        choose = functools.partial(next_token, do_sample=do_sample, temperature=temperature,
                                   top_k=top_k, top_p=top_p, generator=generator)
        training = self.training
        self.eval()
        try:
            tokens = torch.cat([idx, *self.stream(idx, max_new_tokens, choose, stop_token)], dim=1)
        finally:
            self.train(training)
        missing = idx.size(1) + max_new_tokens - tokens.size(1)
        return F.pad(tokens, (0, missing), value=stop_token)

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, choose, stop_token=None):
        """Yield the tokens [B, 1] that continue idx [B, T] as they are made, of a model in
        evaluation mode. choose: a function from logits [B, V] to tokens [B, 1]. The stream ends
        early once each row has come to `stop_token`."""
        if idx.dim() != 2 or idx.numel() == 0:
            raise ValueError(f"idx has to be [B, T] with a token or more, not {list(idx.shape)}")
        assert max_new_tokens >= 0 and not self.training
        (B, T), config = idx.shape, self.config
        cache = torch.empty(  # keys and values
            config.n_layer, 2, B, config.n_head, min(T + max_new_tokens, config.block_size),
            config.n_embd // config.n_head, dtype=self.h[0].ln_1.weight.dtype, device=idx.device)
        cached = 0  # how many positions of the window are in the cache
        stopped = torch.zeros(B, 1, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            window = idx[:, -config.block_size:]
            x = self.hidden(window[:, cached:], cache, cached)
            # Next time only the new token is not in the cache. But once the window slides, each of
            # its tokens has a new position, and nothing in the cache is right any more.
            cached = window.size(1) if idx.size(1) < config.block_size else 0
            token = choose(self.logits(x[:, -1]))
            if stop_token is not None:
                token = token.masked_fill(stopped, stop_token)
                stopped = token == stop_token
            yield token
            if stop_token is not None and stopped.all():
                return
            idx = torch.cat([idx, token], dim=1)

    @classmethod
    def from_pretrained(cls, name_or_dir, dropout=0.0):
        """A trained model, as load_model (below) reads it: float32, on the CPU, in eval mode."""
        return load_model(name_or_dir, dropout)

    def crop(self, block_size):
        """Keep only the first `block_size` positions. Raises ValueError where there are fewer."""
        if block_size > self.config.block_size:
            raise ValueError(f"the model was trained for blocks of at most "
                             f"{self.config.block_size:,} tokens, not of {block_size:,}")
        wpe = self.wpe.weight[:block_size].detach().clone()
        self.wpe = nn.Embedding.from_pretrained(wpe, freeze=False)
        self.config.block_size = block_size


def next_token(logits, do_sample=True, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Choose the next token of each row (Q3.3). logits [B, V] -> tokens [B, 1]

    Without do_sample, or at temperature 0, it is the most probable. Else it is drawn from
    softmax(logits / temperature), restricted to
    - the top_k most probable tokens (None or 0: all), and of these
    - the fewest, the most probable first, that make up a share of at least top_p (None or 1: all;
      0: the first; Holtzman et al., 2020, arXiv:1904.09751).
    """
    if temperature < 0 or (top_k or 0) < 0:
        raise ValueError(f"temperature {temperature} and top_k {top_k} must not be negative")
    if not do_sample or temperature < 1e-6:  # 0, or as good as 0
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    nucleus = top_p is not None and top_p < 1
    if top_k or nucleus:
        V = logits.size(-1)
        top, ids = logits.topk(min(top_k or V, V))  # the most probable first
        if nucleus:
            mass = F.softmax(top, dim=-1).cumsum(dim=-1)
            top[:, 1:][mass[:, :-1] >= top_p] = -math.inf  # the first always stays
        logits = torch.full_like(logits, -math.inf).scatter(-1, ids, top)
    probs = F.softmax(logits, dim=-1)
    if probs.device.type == "mps":  # its multinomial has drawn wrongly for years
        return torch.multinomial(probs.cpu(), 1, generator=generator).to(probs.device)
    return torch.multinomial(probs, 1, generator=generator)


# -- The text ---------------------------------------------------------------------------------

SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt")


def find_text(data_dir):
    """-> the path of tiny Shakespeare, which is downloaded where it is not in data_dir, or where
    that fails, of the text of Python's own documentation"""
    path = Path(data_dir, "tinyshakespeare.txt")
    try:
        if not path.exists():
            fetch(SHAKESPEARE, path)
    except ConnectionError as error:
        from pydoc_data.topics import topics

        print(f"warning: {error}; this run learns Python's documentation", file=sys.stderr)
        path = path.with_name("python-topics.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        common.save(path, lambda file: file.write("\n".join(topics.values()).encode("utf-8")))
    return path


def read_pieces(file, length, title):
    """Yield the next `length` characters of an open text file, a million at a time."""
    with tqdm(desc=title, unit=" characters", unit_scale=True, delay=1, leave=False,
              disable=None) as bar:
        while piece := file.read(min(length, 2**20)):
            length -= len(piece)
            bar.update(len(piece))
            yield piece


def scan_text(path, limit, distinct):
    """-> the length of a text file, or of its first `limit` characters, its SHA-256, and with
    `distinct` a string of its different characters

    Raises UserError where there are no characters, and for what is not UTF-8.
    """
    if not path.is_file():
        raise common.UserError(f"--text {path} is not a file; a pipe, which can be read only once, "
                               "has to be saved to one")
    length, characters, digest = 0, set(), hashlib.sha256()
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for piece in read_pieces(file, limit or sys.maxsize, "reading"):
                length += len(piece)
                digest.update(piece.encode("utf-8"))
                if distinct:
                    characters.update(piece)
    except UnicodeDecodeError as error:
        raise common.UserError(f"{path} is not a UTF-8 text ({error}): convert it") from error
    if length == 0:
        raise common.UserError(f"{path} is empty: there is nothing to learn from")
    return length, digest.hexdigest(), "".join(sorted(characters))


def tokenize(path, length, digest, tokenizer, folder, block_size, check):
    """The tokens of the first 90% of a text's characters, to train on, and of the rest, to
    validate. They are kept in `folder` for the next run. -> two memory maps

    check: whether to compare the checksum, once on each machine. Raises UserError where there are
    too few tokens, or their file is damaged.
    """
    key = hashlib.sha256((digest + tokenizer.fingerprint).encode()).hexdigest()[:16]
    tokens, index = folder / f"tokens-{key}.bin", folder / f"tokens-{key}.json"
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32

    def check_length(train, val):
        if train <= block_size or val < 2:
            raise common.UserError(f"{path} is too short: it has {train:,} tokens to train on and "
                                   f"{val:,} to validate, and needs more than {block_size:,} "
                                   "(--block-size) and 1")

    counts = []

    def write(target):
        with open(path, encoding="utf-8", newline="") as source:
            for part in (int(0.9 * length), length - int(0.9 * length)):
                start = target.tell()
                for ids in tokenizer.encode_pieces(read_pieces(source, part, "tokenizing")):
                    target.write(np.array(ids, dtype))
                counts.append((target.tell() - start) // dtype().itemsize)
        check_length(*counts)  # before the file is there

    if not (tokens.exists() and index.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        common.save(tokens, write)
        checksum = zlib.crc32(np.memmap(tokens, np.uint8, "r"))
        common.write_json(index, {"train": counts[0], "val": counts[1], "crc32": checksum})
    sizes = json.loads(index.read_text(encoding="utf-8"))
    check_length(sizes["train"], sizes["val"])
    if tokens.stat().st_size != (sizes["train"] + sizes["val"]) * dtype().itemsize or (
            check and sizes["crc32"] != zlib.crc32(np.memmap(tokens, np.uint8, "r"))):
        raise common.UserError(f"{tokens} is damaged: delete it, and it is made again")
    ids = np.memmap(tokens, dtype, "r")
    return ids[:sizes["train"]], ids[sizes["train"]:]


def windows(tokens, starts, length):
    """The `length` tokens from each of `starts` on. -> int64 [len(starts), length]"""
    return torch.from_numpy(tokens[starts[:, None] + np.arange(length)].astype(np.int64))


# -- Optimizer and evaluation -----------------------------------------------------------------


def learning_rate(step, args):
    """It rises to --lr in the first --warmup steps, then falls to --min-lr in a straight line."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / (args.max_steps - args.warmup)  # from 0 to almost 1
    return args.lr + (args.min_lr - args.lr) * progress


def flops_per_token(model):
    """Of a training step: 6 for each parameter outside wpe (2 forward, 4 backward), and 12 T C for
    each layer's attention (Chowdhery et al., 2022, arXiv:2204.02311, Appendix B)."""
    weights = sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()
    config = model.config
    return 6 * weights + 12 * config.n_layer * config.block_size * config.n_embd


def can_compile(device):
    """Whether torch.compile works here; if not, say so in a warning."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1, device=device))
        return True
    except Exception as error:  # no C++ compiler, an old GPU, ...: each raises its own
        print(f"warning: --compile does not work here ({str(error).strip().splitlines()[0]}); "
              "going on without it", file=sys.stderr)
        return False


def process():
    """-> the rank of this process and how many there are: (0, 1) without torchrun"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def add_up(tensor):
    """Replace `tensor` by its sum over all processes, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def barrier():
    """Wait until every process has come here."""
    add_up(torch.zeros(1))


def check_finite(loss, step, rank):
    """Raises UserError for a loss, the same on all processes, that is inf or nan. Only the first
    process says so."""
    if not math.isfinite(loss):
        if rank > 0:
            sys.exit(2)
        raise common.UserError(f"the loss is not finite at step {step}: start again with a lower "
                               "--lr (the run's folder holds the last good model)")


@torch.no_grad()
def evaluate(model, tokens, num_bytes, batch_size, dtype):
    """The mean cross-entropy over all whole windows of block_size in `tokens`, one after another.

    num_bytes: the length of each token of the vocabulary in UTF-8. -> nats per token, and bits per
    byte of text, by which models with different tokenizers can be compared
    """
    device, training, (rank, world_size) = model.wte.weight.device, model.training, process()
    T = min(model.config.block_size, len(tokens) - 1)
    starts = np.arange(0, len(tokens) - T, T)
    totals = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    model.eval()
    for first in range(batch_size * rank, len(starts), batch_size * world_size):
        batch = windows(tokens, starts[first:first + batch_size], T + 1)  # [B, T + 1]
        x, y = batch[:, :-1].to(device), batch[:, 1:].to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(x, y)[1].item()
        totals += torch.tensor([loss * y.numel(), y.numel(), num_bytes[batch[:, 1:]].sum()])
    model.train(training)
    nats, count, length = add_up(totals).tolist()
    return nats / count, nats / length / math.log(2)


def draw_sample(model, tokenizer, run, step):
    """Save and print 200 tokens of the model's own, from the same random numbers each time."""
    device = model.wte.weight.device
    generator = torch.Generator("cpu" if device.type == "mps" else device).manual_seed(0)
    idx = torch.tensor([[tokenizer.start]], device=device)
    tokens = model.generate(idx, 200, top_k=40, generator=generator)
    text = tokenizer.decode(tokens[0, 1:].tolist())
    common.save(run / f"sample_step_{step:06d}.txt", lambda file: file.write(text.encode("utf-8")))
    print(textwrap.indent(text, "    "), flush=True)


# -- The train command ------------------------------------------------------------------------

# What `train` does where no flag says otherwise. "cpu", also for MPS: as much as two cores learn in
# a few minutes. "cuda": nanoGPT's sizes, but not its 5,000 steps (in a run of these, validation was
# best at step 1,500, after 17 seconds on an H100). "init": a few steps, at a low rate.
RECIPES = {
    "cpu": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 8,
            "dropout": 0.0, "max_steps": 3000, "eval_every": 600},
    "cuda": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64,
             "dropout": 0.2, "max_steps": 2000, "eval_every": 200},
    "init": {"batch_size": 4, "dropout": 0.0, "max_steps": 100, "eval_every": 25},
}
# The highest learning rate times n_embd. Muon's is also that of what AdamW trains beside it.
RATES = {"adamw": 0.4, "muon": 0.9}


def train_arguments(argv):
    """-> the arguments of `train`, and with --resume the content of the run's last.pt"""
    parser = argparse.ArgumentParser(
        prog="gpt.py", usage="gpt.py train [options]", allow_abbrev=False,
        description="Learn a text. What is not given depends on the device, or --init.",
        formatter_class=common.HelpFormatter)
    add, number = parser.add_argument, common.number

    def recipe(name):  # the defaults, for --help
        return ", ".join(f"{values[name]} for {key}" for key, values in RECIPES.items()
                         if name in values)

    add("--text", metavar="FILE", help="any UTF-8 text; its last 10%% validate (tiny Shakespeare)")
    add("--tokenizer", choices=["char", "gpt2"], help="tokens are characters, or those of GPT-2 "
        "(char, or what --init comes with)")
    add("--init", default="scratch", metavar="scratch|NAME|OWNER/NAME|DIR", help="a model to train "
        "further, as in generate --model, or none")
    add("--size", choices=SIZES, help="n-layer, n-head and n-embd by name")
    for name, text in (("n-layer", "layers"), ("n-head", "attention heads per layer"),
                       ("n-embd", "the embedding's size"), ("block-size", "tokens seen at once"),
                       ("batch-size", "sequences per step, over all processes"),
                       ("max-steps", "steps in all"),
                       ("eval-every", "steps between evaluations, which save the run")):
        add(f"--{name}", type=number(int, 1), help=f"{text} ({recipe(name.replace('-', '_'))})")
    add("--dropout", type=number(float, 0, 1), help=f"share dropped ({recipe('dropout')})")
    add("--eval-tokens", type=number(int, 1), metavar="N", help="validate on the whole blocks of "
        "the first N tokens only, instead of all")
    add("--grad-accum", type=number(int, 1), default=1, help="parts in which each process computes "
        "a step, to save memory")
    add("--optimizer", choices=["muon", "adamw"], help="muon: for the layers' matrices, adamw for "
        "the rest (muon from scratch, adamw for init)")
    add("--lr", type=number(float, 0), help=f"highest learning rate ({RATES['muon']} / n_embd with "
        f"muon, {RATES['adamw']} / n_embd with adamw, 5e-05 for init)")
    add("--min-lr", type=number(float, 0), default=0.0, help="learning rate at the end")
    add("--warmup", type=number(int, 0), metavar="STEPS", help="steps in which the rate rises (a "
        "hundredth of max-steps)")
    add("--weight-decay", type=number(float, 0), default=0.1, help="of matrices and embeddings")
    add("--grad-clip", type=number(float, 0), default=1.0, help="the gradient's highest norm; 0: "
        "any")
    add("--compile", action="store_true", help="torch.compile: minutes of preparation, then faster "
        "steps on a GPU; on a CPU it brought no speed")
    common.add_run_arguments(parser)
    args, state = common.parse_args(parser, argv, may_change={
        "text", "max_steps", "eval_every", "lr", "min_lr", "warmup", "grad_accum", "compile"})
    own = [f"--{name.replace('_', '-')}" for name in ("size", "n_layer", "n_head", "n_embd")
           if getattr(args, name) is not None]
    if state is None and args.init != "scratch" and own:
        raise common.UserError(f"--init keeps the size of its model: leave out {' '.join(own)}")
    return args, state


@contextlib.contextmanager
def user_errors():
    """What models, tokenizers and texts raise that are missing or damaged becomes a UserError."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise common.UserError(" ".join(str(error).split())) from error


def find_tokenizer(args, characters):
    """The tokenizer that comes with --init, or else the one that --tokenizer names.

    Raises UserError where the two differ, FileNotFoundError where there is none.
    """
    if args.init != "scratch":
        try:
            tokenizer = load_tokenizer(args.init)
            own = "gpt2" if isinstance(tokenizer, BPETokenizer) else "char"
            if args.tokenizer not in (None, own):
                raise common.UserError(f"--tokenizer {args.tokenizer} does not fit --init "
                                       f"{args.init}, which has one of its own, {own}")
            return tokenizer
        except FileNotFoundError:
            if args.tokenizer is None:
                raise
    if args.tokenizer != "gpt2":
        return CharTokenizer(characters)
    folder = Path(args.data_dir, "gpt2")
    return load_tokenizer_files(folder) if folder.is_dir() else load_tokenizer("gpt2")


def train(argv):
    """The `train` command; under torchrun each process runs it."""
    # -- Arguments and device -----------------------------------------------------------------
    args, state = train_arguments(argv)
    device, dtype = common.pick_device(args.device, amp=not args.no_amp)
    torch.set_flush_denormal(True)  # a CPU takes many times longer for numbers below 1e-38
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    if state is None:
        args.defaults = ("init" if args.init != "scratch" else
                         "cuda" if device.type == "cuda" else "cpu")
        by_size = zip(("n_layer", "n_head", "n_embd"), SIZES.get(args.size, ()), strict=False)
        for name, value in (RECIPES[args.defaults] | dict(by_size)).items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        args.optimizer = args.optimizer or ("adamw" if args.defaults == "init" else "muon")
        args.warmup = args.max_steps // 100 if args.warmup is None else args.warmup

    # -- Processes ----------------------------------------------------------------------------
    world_size, local_rank = (int(os.environ.get(name, default)) for name, default in (
        ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if args.batch_size % (args.grad_accum * world_size):
        raise common.UserError(f"--batch-size {args.batch_size} is not a multiple of --grad-accum "
                               f"{args.grad_accum} times {world_size}, the number of processes")
    if world_size > 1:
        if device.type == "cuda":
            if local_rank >= torch.cuda.device_count():
                raise common.UserError(f"there are {torch.cuda.device_count()} GPUs here: choose "
                                       "--nproc-per-node accordingly")
            torch.cuda.set_device(local_rank)
        # Gradients go through NCCL on GPUs; flags and barriers are CPU tensors, and need gloo.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    rank, _ = process()

    # -- Text, tokenizer and model ------------------------------------------------------------
    # The first process of each machine downloads and tokenizes. The others wait here until it comes
    # to its barrier, below, and then find the files.
    if local_rank > 0:
        barrier()
    torch.manual_seed(args.seed)
    with user_errors():
        path = Path(args.text or find_text(args.data_dir))
        by_default = args.tokenizer is None and args.init == "scratch"
        distinct = state is None and (args.tokenizer == "char" or by_default)
        length, digest, characters = scan_text(path, args.limit, distinct)
        if state and state["text"] != digest:
            raise common.UserError(f"{path} is not the text that {args.resume} began with: give "
                                   "that one as --text")
        args.text = str(path)  # so that a resumed run takes the same, whatever is downloaded then
        tokenizer = load_tokenizer_files(args.resume) if state else find_tokenizer(args, characters)
        if state:
            model = GPT(GPTConfig(**state["config"]))
            model.load_state_dict(state["model"])
        elif args.init == "scratch":
            V = len(tokenizer)
            padded = V if isinstance(tokenizer, CharTokenizer) else 64 * math.ceil(V / 64)
            model = GPT(GPTConfig(V, args.block_size, args.n_layer, args.n_head, args.n_embd,
                                  args.dropout, eos_token_id=tokenizer.end_of_text,
                                  padded_vocab_size=padded))
        else:
            model = GPT.from_pretrained(args.init, args.dropout).train()
            args.block_size = args.block_size or min(model.config.block_size, 256)
            model.crop(args.block_size)
        config = model.config
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer):,} tokens and {args.init} "
                             f"{config.vocab_size:,}: they do not belong together")
        beside = Path(args.resume or args.out_dir or f"runs/gpt-{path.stem}").absolute().parent
        T = config.block_size
        train_tokens, val_tokens = tokenize(path, length, digest, tokenizer, beside, T,
                                            check=local_rank == 0)
    if local_rank == 0:
        barrier()
    checksum = int(digest[:12], 16)
    if add_up(torch.tensor(checksum)) != world_size * checksum:
        raise common.UserError(f"{path} is not the same text on every machine")
    num_bytes = np.array([tokenizer.num_bytes(id) for id in range(len(tokenizer))])
    if args.eval_tokens:
        val_tokens = val_tokens[:args.eval_tokens + 1]  # the last has a target, too

    # -- Optimizers ---------------------------------------------------------------------------
    model.to(device)
    if args.lr is None:
        args.lr = 5e-5 if args.defaults == "init" else RATES[args.optimizer] / config.n_embd
    embeddings = [model.wte.weight, model.wpe.weight]
    matrices = [p for p in model.h.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]  # biases, and LayerNorms' weights
    muon = args.optimizer == "muon"
    optimizers = {"adamw": torch.optim.AdamW(
        [{"params": embeddings if muon else embeddings + matrices},
         {"params": vectors, "weight_decay": 0.0}],
        args.lr, betas=(0.9, 0.99), weight_decay=args.weight_decay, fused=True,
        capturable=True)}  # for common.cuda_graph
    if muon:  # with its usual momentum, 0.95, the CPU recipe ends 0.006 higher
        optimizers["muon"] = common.Muon(matrices, args.lr, args.weight_decay, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    net = model  # or wrapped: compiled, or averaging the gradients of all processes
    if args.compile and can_compile(device):
        net = torch.compile(net, dynamic=False)
    if world_size > 1:
        net = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)

    # -- A new run, or an old one to go on with -----------------------------------------------
    rows = []  # one an evaluation
    if state:
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizer"][name])
        if state["scaler"]:  # empty after training without float16
            scaler.load_state_dict(state["scaler"])
        rows = state["rows"]
    # The learning rate is a tensor, which is filled before each step and read by a CUDA graph. It
    # is set here, as load_state_dict would replace it by a copy.
    lr = torch.zeros((), device=device)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = lr
    heading = (f"GPT on {path.name}, "
               f"{'characters' if isinstance(tokenizer, CharTokenizer) else 'GPT-2 tokens'}")
    done = rows[-1]["step"] if rows else 0
    if rank == 0:
        run = common.open_run(args, state, f"gpt-{path.stem}", done, "max_steps")
        if state is None:
            with user_errors():
                tokenizer.save(run)
        count = sum(p.numel() for p in model.parameters())
        print(f"{heading}: {count:,} parameters ({config.n_layer} layers, {config.n_head} heads, "
              f"{config.n_embd} wide; defaults: {args.defaults}) on "
              f"{f'{world_size} x ' if world_size > 1 else ''}{device} in "
              f"{str(dtype).removeprefix('torch.')}; {len(train_tokens):,} train, "
              f"{len(val_tokens):,} val tokens, {len(tokenizer):,} different; {args.max_steps:,} "
              f"steps of {args.batch_size} x {T} tokens, {done:,} of them done, saved every "
              f"{args.eval_every:,}; -> {run}", flush=True)
    del state  # a second copy of the weights and moments

    # -- Training -----------------------------------------------------------------------------
    tokens_per_step = args.batch_size * T
    part_size = args.batch_size // (args.grad_accum * world_size)
    evaluations = [*range(0, args.max_steps, args.eval_every), args.max_steps]  # 0: untrained
    if rows:
        evaluations = [step for step in evaluations if step > done]
    offset = random.Random(args.seed).random()

    def train_step(batch):  # [B / world_size, T + 1]; in the form that common.cuda_graph takes
        loss = torch.zeros((), device=device)
        for i, part in enumerate(batch.split(part_size), 1):
            # DDP averages over the processes in backward(): only with the last part.
            average = world_size > 1 and i == args.grad_accum
            with contextlib.nullcontext() if world_size == 1 or average else net.no_sync():
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    part_loss = net(part[:, :-1], part[:, 1:])[1] / args.grad_accum
                scaler.scale(part_loss).backward()
            loss += part_loss.detach()
        for optimizer in optimizers.values():
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        for optimizer in optimizers.values():
            # A scaler looks at one optimizer's gradients. Where any in float16 overflowed, no
            # optimizer may make its step.
            if not scaler.is_enabled() or norm.isfinite():
                scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        # The loss, the gradient's norm (0 where it overflowed), and whether it is finite
        return torch.stack([loss, norm.nan_to_num(0, posinf=0), norm.isfinite().float()])

    # A CUDA graph cannot read a number back, as a scaler does. With DDP it has not been tried.
    if device.type == "cuda" and world_size == 1 and not scaler.is_enabled():
        train_step = common.cuda_graph(train_step)
    for end in evaluations:  # the first, before any step, is at 0
        began, steps = time.perf_counter(), end - done
        # For dropout, the same in a resumed run (integers have the same hash in every process)
        torch.manual_seed(hash((args.seed, done, rank)))
        sums = torch.zeros(3, device=device)  # losses, gradient norms, and how many were finite
        bar = tqdm(range(done, end), f"step {end}/{args.max_steps}", unit=" tok",
                   unit_scale=tokens_per_step, leave=False, disable=rank > 0 or None)
        for step in bar:
            lr.fill_(learning_rate(step, args))
            # Window n begins at the fraction offset + n * golden ratio, modulo 1, of the text. Such
            # points fill an interval evenly (Weyl, 1916): a first pass sees 89% of the text, and
            # would see 63% at random. Each process takes its share of a step's windows.
            n = np.arange(step * args.batch_size, (step + 1) * args.batch_size)
            starts = (offset + n * (1 + 5**0.5) / 2) % 1 * (len(train_tokens) - T)
            starts = np.split(starts.astype(np.int64), world_size)[rank]
            batch = windows(train_tokens, starts, T + 1)
            if device.type == "cuda":
                batch = batch.pin_memory()  # or the copy would wait for the device
            figures = train_step(batch.to(device, non_blocking=True))
            sums += figures
            if step % 50 == 49:  # not each time: to read the loss is to wait for the device
                bar.set_postfix_str(f"loss {figures[0]:.3f} lr {lr:.1e} norm {figures[1]:.2f}")
                check_finite(add_up(sums[0].clone()).item(), step + 1, rank)
        sum_of_losses, norms, finite = (add_up(sums) / world_size).tolist()  # waits for the device
        elapsed = time.perf_counter() - began
        tokens_per_s = tokens_per_step * steps / elapsed
        val_loss, bits = evaluate(model, val_tokens, num_bytes, part_size, dtype)
        check_finite(sum_of_losses + val_loss, end, rank)
        done = end
        rows.append({
            "epoch": round(done * tokens_per_step / len(train_tokens), 3), "step": done,
            "seconds": round(time.perf_counter() - began + (rows[-1]["seconds"] if rows else 0), 2),
            "tokens_per_s": round(tokens_per_s),
            "train_loss": sum_of_losses / steps if steps else None, "val_loss": val_loss,
            "val_bits_per_byte": bits, "lr": learning_rate(max(done - 1, 0), args),
            "grad_norm": norms / finite if finite else None})
        if rank > 0:
            continue
        if val_loss == min(row["val_loss"] for row in rows):  # the best so far
            save_model(model, run)
        common.save_checkpoint(run / "last.pt", {
            "model": model.state_dict(), "scaler": scaler.state_dict(), "optimizer": {
                name: optimizer.state_dict() for name, optimizer in optimizers.items()},
            "rows": rows, "args": vars(args), "config": dataclasses.asdict(config), "text": digest})
        common.write_json(run / "metrics.jsonl", *rows)
        train_loss, speed = "untrained   ", ""
        if steps:
            train_loss = f"train {rows[-1]['train_loss']:.4f}"
            speed = (f"lr {rows[-1]['lr']:.1e} norm {rows[-1]['grad_norm'] or 0:.2f} | "
                     f"{1000 * elapsed / steps:.1f} ms {tokens_per_s / 1000:.1f}k tok/s "
                     f"{flops_per_token(model) * tokens_per_s / 1e12:.2f} TFLOP/s | ")
        print(f"step {done:5d}/{args.max_steps} | {train_loss} | val {val_loss:.4f} | {bits:.3f} "
              f"bits/byte | {speed}{rows[-1]['seconds']:.1f} s", flush=True)
        draw_sample(model, tokenizer, run, done)
        if steps:
            common.save_curves(run / "loss.png", f"{heading}\ncross-entropy", "nats per token",
                               rows, {"train": "train_loss", "val": "val_loss"}, {}, x="step")

    # -- The best model -----------------------------------------------------------------------
    if rank == 0:
        best = min(rows, key=lambda row: row["val_loss"])
        print(f"best: step {best['step']}, val {best['val_loss']:.4f}; to read more of it: "
              f"python gpt.py generate --model {shlex.quote(str(run))}")
        common.close_run(args, run, rows, {
            "val_loss": best["val_loss"], "val_bits_per_byte": best["val_bits_per_byte"],
            "step": best["step"], "device": str(device)}, done, "max_steps")
        print(f"{heading} -> {run}")
    if dist.is_initialized():
        dist.destroy_process_group()


# -- Tokenizers -------------------------------------------------------------------------------

END_OF_TEXT = "<|endoftext|>"
# Unicode's \s. That of Python's re has four control characters more.
WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# The settings of a tokenizer.json that change the ids, with GPT-2's values.
GPT2_SETTINGS = {
    "normalizer": {"type": None},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "model": {"type": "BPE", "dropout": None, "continuing_subword_prefix": None,
              "end_of_word_suffix": None, "byte_fallback": False, "ignore_merges": False},
    "added token": {"single_word": False, "lstrip": False, "rstrip": False},
}


@functools.cache
def word_pattern():
    r"""How GPT-2 splits a text into words, numbers, other characters and white space:

    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

    with Unicode's letters, \p{L}, and numbers, \p{N}, written out, as Python's re has neither.
    """
    classes = collections.defaultdict(str)
    characters = map(chr, range(sys.maxunicode + 1))
    for kind, run in itertools.groupby(characters, lambda c: unicodedata.category(c)[0]):
        run = list(run)
        classes[kind] += f"{re.escape(run[0])}-{re.escape(run[-1])}"
    letter, number, space = classes["L"], classes["N"], WHITE_SPACE
    return re.compile(f"'(?:[sdmt]|ll|ve|re)| ?[{letter}]+| ?[{number}]+"
                      f"| ?[^{space}{letter}{number}]+|[{space}]+(?![^{space}])|[{space}]+")


def read_json(path):
    """A file of JSON -> dict. A byte-order mark is skipped."""
    with reading(path):
        return {**json.loads(Path(path).read_text(encoding="utf-8-sig"))}  # {**...} refuses a list


def read_vocabulary(vocab_file, merges_file):
    """-> vocab {token: id}, merges [(left, right), ...], added tokens {text: id}"""
    saved = read_json(vocab_file)
    if merges_file is not None:
        lines = Path(merges_file).read_text(encoding="utf-8-sig").split("\n")
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        added_file = Path(vocab_file).with_name("added_tokens.json")
        return saved, merges, read_json(added_file) if added_file.exists() else {}
    model, added = saved["model"], saved.get("added_tokens", [])
    parts = [(name, saved.get(name)) for name in ("normalizer", "pre_tokenizer", "model")]
    for name, part in [*parts, *(("added token", token) for token in added)]:
        for setting, value in GPT2_SETTINGS[name].items():
            found = (part or {"type": None}).get(setting, value)
            if (found or None) != (value or None):  # "", 0 and false are off, as null is
                raise ValueError(f"the {setting} of its {name} is {found!r}, not {value!r}")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return model["vocab"], merges, {token["content"]: token["id"] for token in added}


class BPETokenizer:
    """GPT-2's byte-level byte-pair encoding (Sennrich et al., 2016, arXiv:1508.07909).

    A text is split into words, and a word into its UTF-8 bytes, a token each. Then, again and
    again, two tokens side by side become one: the pair that stands earliest in a list of 50,000,
    and where it occurs twice, the left one. Special tokens, as <|endoftext|>, are never split.

    vocab_file, merges_file: the paths of vocab.json (added_tokens.json may lie beside it) and
    merges.txt, or of a tokenizer.json alone. Raises ValueError where they are damaged, do not
    belong together or split a text in another way, and OSError where they cannot be read.
    """

    def __init__(self, vocab_file, merges_file=None):
        # The files write a byte as a character that can be seen: its own, or one past U+00FF.
        visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
        others = itertools.count(256)
        alphabet = [chr(b if b in visible else next(others)) for b in range(256)]
        byte_of = {character: byte for byte, character in enumerate(alphabet)}
        try:
            vocab, pairs, added = read_vocabulary(vocab_file, merges_file)
            ids = {**vocab, **added}
            if sorted(ids.values()) != [*range(len(ids))]:
                raise ValueError("the ids are not 0, 1, 2, ...")
            self.vocab = vocab
            self.special = {t: id for t, id in ids.items() if t in added or t == END_OF_TEXT}
            self.byte_ids = [vocab[character] for character in alphabet]
            self.merges = [(vocab[a], vocab[b], vocab[a + b]) for a, b in pairs]
            made = {*self.byte_ids, *(merged for _, _, merged in self.merges)}
            self.bytes_of = {}
            for text, id in ids.items():
                if id not in made and text[0] + text[-1] != "<>" and text not in self.special:
                    raise ValueError(f"no merge makes {text!r}")
                self.bytes_of[id] = (text.encode("utf-8") if text in self.special else
                                     bytes(byte_of[character] for character in text))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            files = " and ".join(str(file) for file in (vocab_file, merges_file) if file)
            raise ValueError(f"{files}: damaged, not of one model, or not GPT-2's kind "
                             f"({type(error).__name__}: {error})") from error
        self.ranks = {(left, right): rank for rank, (left, right, _) in enumerate(self.merges)}
        self.end_of_text = self.special.get(END_OF_TEXT)
        self.start = self.end_of_text or 0  # what a text without a prompt starts from
        definition = json.dumps([vocab, self.merges, self.special], sort_keys=True)
        self.fingerprint = hashlib.sha256(definition.encode("utf-8")).hexdigest()[:16]
        self.known = {}  # the ids of words met before
        texts = sorted(self.special, key=len, reverse=True)  # of two that match, the longer
        self.special_pattern = re.compile(f"({'|'.join(map(re.escape, texts)) or '(?!)'})")
        self.longest = max(3, *map(len, texts)) if texts else 3  # 3 as in 'll

    def __len__(self):
        return len(self.bytes_of)

    def num_bytes(self, id):
        return len(self.bytes_of[id])

    def _merge(self, word):
        """The ids of one word, in a time that grows little faster than its length."""
        # A merge at i takes its right neighbour j = after[i] out of the chain:
        #
        #              h   i   j   k                    h   i   j   k
        #      ids     l   o   w   s                    l   ow  -   s
        #      after   i   j   k       -- o w -->       i   k
        #      before      h   i   j                        h       i
        #
        # The queue holds (rank, i) of each pair that can merge, and of some that are gone.
        ids = [self.byte_ids[byte] for byte in word.encode("utf-8")]
        before, after = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))
        pairs = enumerate(itertools.pairwise(ids))
        queue = [(self.ranks[pair], i) for i, pair in pairs if pair in self.ranks]
        heapq.heapify(queue)
        while queue:
            rank, i = heapq.heappop(queue)
            left, right, merged = self.merges[rank]
            j = after[i]
            if ids[i] != left or j == len(ids) or ids[j] != right:
                continue  # an earlier merge took one of the two
            h, k = before[i], after[j]
            ids[i], ids[j], after[i] = merged, None, k
            if h >= 0 and (rank := self.ranks.get((ids[h], merged))) is not None:
                heapq.heappush(queue, (rank, h))
            if k < len(ids):
                before[k] = i
                if (rank := self.ranks.get((merged, ids[k]))) is not None:
                    heapq.heappush(queue, (rank, i))
        return [id for id in ids if id is not None]

    def _encode_words(self, words):
        ids = []
        for word in words:
            if (known := self.known.get(word)) is None:
                known = self._merge(word)
                if len(word) < 100 and len(self.known) < 2**16:  # a bound on the memory
                    self.known[word] = known
            ids += known
        return ids

    def encode(self, text, special=True):
        """text -> list of ids. Without `special`, special tokens are text like any other. Half a
        surrogate pair counts as U+FFFD."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids, split = [], word_pattern().findall
        for i, part in enumerate(self.special_pattern.split(text) if special else [text]):
            ids += [self.special[part]] if i % 2 else self._encode_words(split(part))
        return ids

    def encode_pieces(self, pieces):
        """The pieces of a text, cut anywhere -> lists of ids, together those of the whole text.
        The time is linear in the text; the memory follows its longest word."""
        rest = more = ""
        for piece in pieces:
            more += piece
            # What is left over is scanned again only with as much that is new: linear time.
            if len(more) <= len(rest) or "\ud7ff" < more[-1] < "\udc00":  # half a pair
                continue
            text = (rest + more).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            sure = len(text) - self.longest  # a special token that starts later may grow
            ends = [m.end() for m in self.special_pattern.finditer(text) if m.start() <= sure]
            start = ends[-1] if ends else 0
            words, length = word_pattern().findall(text[start:]), 0
            while words and length <= self.longest:  # and so may the last words
                length += len(words.pop())
            yield self.encode(text[:start]) + self._encode_words(words)
            rest, more = text[len(text) - length:], ""
        yield self.encode(rest + more)

    def stream(self, ids):
        """Yield the text of each of `ids` as it comes; what is only part of a character waits for
        the rest of it. What is no UTF-8, or no id, becomes U+FFFD."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for id in ids:
            yield decoder.decode(self.bytes_of.get(int(id), b"\xff"))
        yield decoder.decode(b"", final=True)

    def decode(self, ids):
        """list of ids -> text"""
        return "".join(self.stream(ids))

    def save(self, folder):
        """Write vocab.json, merges.txt and, where there are added tokens, added_tokens.json."""
        token_of = {id: token for token, id in self.vocab.items()}
        lines = [f"{token_of[left]} {token_of[right]}\n" for left, right, _ in self.merges]
        added = {text: id for text, id in self.special.items()
                 if text != END_OF_TEXT or text not in self.vocab}
        Path(folder, "vocab.json").write_text(json.dumps(self.vocab), encoding="utf-8")
        Path(folder, "merges.txt").write_text("".join(["#version: 0.2\n", *lines]), "utf-8")
        if added:
            Path(folder, "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")


class CharTokenizer:
    """A token for each character of the string `characters`."""

    special, end_of_text = {}, None

    def __init__(self, characters):
        self.characters = characters
        self.ids = {character: id for id, character in enumerate(characters)}
        self.start = self.ids.get("\n", 0)  # what a text without a prompt starts from
        self.fingerprint = hashlib.sha256(json.dumps(characters).encode()).hexdigest()[:16]

    def __len__(self):
        return len(self.characters)

    def num_bytes(self, id):
        return len(self.characters[id].encode("utf-8"))

    def encode(self, text, special=True):
        """text -> list of ids. Raises ValueError for characters that are not among them."""
        if unknown := set(text) - self.ids.keys():
            raise ValueError(f"the model never saw {''.join(sorted(unknown))!r}, and has no token "
                             "for it")
        return [self.ids[character] for character in text]

    def encode_pieces(self, pieces):
        """The pieces of a text -> a list of ids of each"""
        return map(self.encode, pieces)

    def stream(self, ids):
        """Yield the character of each of `ids` as it comes; U+FFFD for what is no id."""
        for id in ids:
            yield self.characters[int(id)] if 0 <= id < len(self.characters) else "\ufffd"

    def decode(self, ids):
        """list of ids -> text"""
        return "".join(self.stream(ids))

    def save(self, folder):
        """Write vocab.json, from character to id."""
        Path(folder, "vocab.json").write_text(json.dumps(self.ids), encoding="utf-8")


def load_tokenizer_files(folder):
    """The tokenizer in a folder. Raises OSError where its files are missing or cannot be read, and
    ValueError where they are damaged."""
    vocab, merges, both = (Path(folder, name) for name in
                           ("vocab.json", "merges.txt", "tokenizer.json"))
    if vocab.exists() and merges.exists():
        return BPETokenizer(vocab, merges)
    if both.exists():
        return BPETokenizer(both)
    if not vocab.exists():
        raise FileNotFoundError(f"{folder} has no tokenizer: neither tokenizer.json nor vocab.json "
                                "(with merges.txt, unless its tokens are single characters)")
    ids = read_json(vocab)
    if max(map(len, ids), default=0) > 1:
        raise FileNotFoundError(f"{merges} is not there: put it beside {vocab.name}")
    tokenizer = CharTokenizer("".join(ids))
    if not ids or tokenizer.ids != ids:
        raise ValueError(f"{vocab} is damaged: its ids are not 0, 1, 2, ...")
    return tokenizer


# -- Weights on disk --------------------------------------------------------------------------

HUB = "https://huggingface.co"
PRETRAINED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # openai-community's there
WEIGHTS = ("model.safetensors", "model.safetensors.index.json",  # an index names the shards
           "pytorch_model.bin", "pytorch_model.bin.index.json")
# Settings of a config.json that change what a model computes, and their values that gpt.py knows;
# the first is what a setting that is left out stands for.
IMPLEMENTED = {
    "model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"],  # the same
    "layer_norm_epsilon": [1e-5], "scale_attn_weights": [True], "add_cross_attention": [False],
    "scale_attn_by_inverse_layer_idx": [False], "reorder_and_upcast_attn": [False],
}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "U8": torch.uint8, "BOOL": torch.bool}  # as safetensors names them


def find_model(name, weights=True):
    """-> the folder with a model's config.json, tokenizer and, if wanted, weights

    name: a folder; or one of PRETRAINED, or OWNER/NAME of another GPT-2 on the hub, which is
    downloaded once.
    """
    name, folder, cache = str(name), Path(name), Path(torch.hub.get_dir(), "checkpoints")
    if name in PRETRAINED and not (folder / "config.json").exists():
        return download(f"openai-community/{name}", cache / name, weights)
    # Where there is a folder `runs`, runs/gpt-shakespaere is a typo, not a model on the hub.
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name, re.A) and not folder.parent.is_dir():
        return download(name, cache / name.replace("/", "--"), weights)
    if not folder.is_dir():
        raise FileNotFoundError(f"{name} is not a folder, nor one of {', '.join(PRETRAINED)}, nor "
                                "OWNER/NAME of a model on the hub")
    return folder


def download(repo, folder, weights):
    """Fetch from the hub what `folder` does not hold yet. -> folder"""
    def have(file):
        """-> whether `file` is in the folder now: False where the hub does not have it"""
        with contextlib.suppress(FileNotFoundError):
            if not (folder / file).exists():
                fetch(f"{HUB}/{repo}/resolve/main/{file}", folder / file)
        return (folder / file).exists()

    if not have("config.json"):
        raise FileNotFoundError(f"{repo} is not on the hub, and there is no folder of this name")
    read_config(folder)  # refuse another architecture before its gigabytes come
    if not any((folder / file).exists() for file in ("merges.txt", "tokenizer.json")):
        have("added_tokens.json")  # which few models have; it is not asked for a second time
        if not (have("vocab.json") and have("merges.txt")):
            have("tokenizer.json")
    if weights:
        if not weight_files(folder):
            any(have(file) for file in WEIGHTS)  # asks up to the first that is there
        for path in weight_files(folder):
            have(path.name)
    return folder


def fetch(url, path):
    """Download a file, whole or not at all. Raises FileNotFoundError where the server does not
    have it, and ConnectionError where that fails, or 15 seconds pass without an answer."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (urllib.request.urlopen(url, timeout=15) as answer,
              tqdm.wrapattr(answer, "read", answer.length, disable=None, leave=False) as source,
              tempfile.TemporaryDirectory(dir=path.parent) as temporary):  # of this process alone
            print(f"downloading {url} to {path}", file=sys.stderr)
            with open(Path(temporary, path.name), "wb") as file:
                shutil.copyfileobj(source, file)
            if answer.length:  # what has not come of its Content-Length
                raise ConnectionError(f"it broke off {answer.length:,} bytes before its end")
            os.replace(file.name, path)
    except (OSError, HTTPException) as error:
        if getattr(error, "code", None) in (401, 404):  # the hub's 401: not there, or private
            raise FileNotFoundError(f"{url} is not there") from error
        raise ConnectionError(
            f"{path.name} is not in {path.parent} and could not be downloaded "
            f"({getattr(error, 'reason', error)}): run once online, or put it there") from error


@contextlib.contextmanager
def reading(path):
    """Whatever a damaged file raises in this block becomes one ValueError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is not there: put it into this folder") from error
    except OSError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".removeprefix("ValueError: ")
        reason = re.split(r"\n|\. ", reason)[0]  # torch writes a page
        with open(path, "rb") as file:
            if file.read(99).startswith(b"version https://git-lfs"):
                reason = "it is a git-lfs pointer: `git lfs pull` puts the file in its place"
        raise ValueError(f"{path} is damaged or not a GPT-2's ({reason}): put a sound copy in its "
                         "place, or choose another model") from error


def read_config(folder):
    """config.json -> GPTConfig. Raises ValueError for a model that gpt.py cannot compute."""
    path = folder / "config.json"
    with reading(path):
        config = json.loads(path.read_text(encoding="utf-8-sig"))
        for setting, known in IMPLEMENTED.items():
            if config.get(setting, known[0]) not in known:
                raise ValueError(f"its {setting} is {config[setting]!r}, and gpt.py computes only "
                                 f"{known[0]!r}")
        end = config.get("eos_token_id")
        return GPTConfig(config["vocab_size"], config["n_positions"], config["n_layer"],
                         config["n_head"], config["n_embd"],
                         eos_token_id=end[0] if isinstance(end, list) else end)


def weight_files(folder):
    """-> the paths of the weights: of one file, of all shards that an index names, or of none"""
    path = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if path is None or path.suffix != ".json":
        return [path] if path else []
    with reading(path):
        shards = json.loads(path.read_text(encoding="utf-8-sig"))["weight_map"].values()
        return [folder / Path(shard).name for shard in sorted(set(shards))]


def read_tensors(path):
    """-> the tensors of one file, by name. They stay in the file until they are used."""
    with reading(path):
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        if is_zip := zipfile.is_zipfile(path):  # from torch 1.6 on; older files cannot be mapped
            with zipfile.ZipFile(path) as archive:  # has checksums, which torch.load ignores
                if damaged := archive.testzip():
                    raise ValueError(f"in {damaged}")
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor)
                   for name, tensor in tensors.items()):
            raise ValueError("it holds something other than tensors by name")
        return tensors


def read_safetensors(path):
    """8 bytes with the length of the header, the header in JSON, and the tensors end to end."""
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    data = memoryview(memory)[8 + int.from_bytes(memory[:8], "little"):]
    header = json.loads(memory[8:len(memory) - len(data)])
    checksum = header.pop("__metadata__", {}).get("crc32")  # save_model's
    if checksum and int(checksum, 16) != zlib.crc32(data):
        raise ValueError("its checksum is wrong")
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (start, stop), dtype = entry["data_offsets"], DTYPES[entry["dtype"]]
        tensors[name] = torch.frombuffer(data[start:stop], dtype=dtype).view(entry["shape"])
        if start != end:
            raise ValueError(f"{name} is out of place")
        end = stop
    if end != len(data):
        raise ValueError(f"{len(data):,} bytes of tensors for {end:,}")
    return tensors


def load_model(name, dropout=0.0):
    """A trained GPT in evaluation mode, float32, on the CPU. dropout: for training it further.

    name: find_model's. Raises ConnectionError where a download fails, FileNotFoundError for files
    that are not there, and ValueError for files that are damaged or hold another model.
    """
    folder = find_model(name)
    config, weights, files = read_config(folder), {}, weight_files(folder)
    if not files:
        raise FileNotFoundError(f"{folder} has no weights: put {' or '.join(WEIGHTS[::2])} there")
    for path in files:
        for key, tensor in read_tensors(path).items():
            # What transformers, torch.compile and DistributedDataParallel put before a name.
            key = re.sub(r"^((transformer|_orig_mod|module)\.)+", "", key)
            if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", key):
                continue  # the causal mask, and what it is filled with
            if key in weights or not tensor.is_floating_point():
                raise ValueError(f"{path}: {key} is there twice, or not of floating-point numbers")
            # GPT-2's layers c_attn, c_proj and c_fc hold [in, out], nn.Linear [out, in].
            transposed = ".c_" in key and key.endswith(".weight")
            weights[key] = tensor.transpose(0, -1) if transposed else tensor
    head = weights.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, weights.setdefault("wte.weight", head)):
        raise ValueError(f"{folder}: lm_head.weight differs from wte.weight, and gpt.py computes "
                         "with one for both")
    config.dropout = dropout
    with torch.device("meta"):  # shapes without memory
        model = GPT(config)
    ours = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    theirs = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    if wrong := sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key)):
        shown = "; ".join(f"{key} is {theirs.get(key, 'missing')}, should be "
                          f"{ours.get(key, 'absent')}" for key in wrong[:3])
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{folder} does not hold the model of its config.json: {shown}{more}")
    model.to_empty(device="cpu")
    model.load_state_dict(weights)  # copies from the file, and makes float32 of 16 bits
    return model.eval()


def load_tokenizer(name):
    """The tokenizer of the model that load_model(name) loads."""
    return load_tokenizer_files(find_model(name, weights=False))


def save_model(model, folder):
    """Write config.json and model.safetensors as for transformers' GPT2LMHeadModel, in float32.
    The weights come last and replace the old ones in one step. Raises common.UserError."""
    folder, config, weights = Path(folder), model.config, model.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    common.write_json(folder / "config.json", {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": config.n_layer,
        "n_head": config.n_head, "n_embd": config.n_embd, "vocab_size": config.vocab_size,
        "n_positions": config.block_size, "n_ctx": config.block_size, "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new", "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout, "attn_pdrop": config.dropout, "tie_word_embeddings": True,
        "bos_token_id": config.eos_token_id, "eos_token_id": config.eos_token_id,
        "torch_dtype": "float32"}, indent=2)
    weights["wte.weight"] = weights["wte.weight"][:config.vocab_size]  # without the padding
    header, end = {"__metadata__": {"format": "pt", "crc32": "........"}}, 0  # known at the end
    for name, tensor in weights.items():
        if ".c_" in name and name.endswith(".weight"):
            weights[name] = tensor = tensor.T  # [in, out]
        start, end = end, end + 4 * tensor.numel()
        header[f"transformer.{name}"] = {"dtype": "F32", "shape": list(tensor.shape),
                                         "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)

    def write(file):
        checksum = 0
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in weights.values():  # one at a time in the CPU's memory
            data = tensor.float().cpu().contiguous().numpy()
            file.write(data)
            checksum = zlib.crc32(data, checksum)
        file.seek(8 + header.index(b"........"))
        file.write(b"%08x" % checksum)

    common.save(folder / "model.safetensors", write)


# -- The generate command ---------------------------------------------------------------------


def up_to(texts, stop):
    """Yield `texts` up to the first `stop` in them, which may span several. Where a text ends like
    the beginning of it, this end is held back until the next text tells."""
    held = ""
    for text in texts:
        held += text
        if (end := held.find(stop)) >= 0:
            yield held[:end]
            return
        keep = next(n for n in range(len(stop) - 1, -1, -1) if held.endswith(stop[:n]))
        yield held[:len(held) - keep]
        held = held[len(held) - keep:]
    yield held


def generate(argv):
    """The `generate` command: texts to standard output, all else to standard error."""
    parser = argparse.ArgumentParser(
        prog="gpt.py", usage="gpt.py generate [options]", allow_abbrev=False,
        description="Continue a prompt.", formatter_class=common.HelpFormatter)
    add, number = parser.add_argument, common.number
    add("--model", default="gpt2", metavar="NAME|OWNER/NAME|DIR", help=f"{', '.join(PRETRAINED)}; "
        "a GPT-2 on the Hugging Face hub; or a folder in its layout, such as a run's")
    add("--prompt", default="", metavar="TEXT", help="how the text begins, best without a space at "
        "its end; - reads it from standard input")
    add("--num-samples", type=number(int, 1), default=1, help="texts, made as one batch")
    add("--max-new-tokens", type=number(int, 0), default=200, help="tokens at most in each")
    add("--stop", metavar="TEXT", help="end before this text")
    add("--greedy", action="store_true", help="always the most probable token")
    add("--temperature", type=number(float, 0), default=1.0, help="below 1 favours the more "
        "probable tokens, above 1 the others; 0 is greedy")
    add("--top-k", type=number(int, 0), default=40, help="draw from the k most probable tokens; 0: "
        "from all")
    add("--top-p", type=number(float, 0, 1), default=1.0, help="draw from the most probable tokens "
        "that make up this share")
    add("--seed", type=number(int, 0), default=42, help="another seed, another text")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="auto takes cuda, else mps, else cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
        help="of the layers; embeddings and logits stay in float32")
    args = parser.parse_args(argv)
    if args.greedy and any(getattr(args, name) != parser.get_default(name)
                           for name in ("temperature", "top_k", "top_p")):
        parser.error("--greedy leaves nothing to --temperature, --top-k, --top-p: leave them out")
    if args.stop == "":
        parser.error("--stop needs a text of one character or more")

    device, _ = common.pick_device(args.device, amp=False)
    torch.set_flush_denormal(True)  # a CPU takes many times longer for numbers below 1e-38
    # On Hopper cards torch would take cuDNN's attention, which plans anew for each length: here for
    # each token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    with user_errors():
        prompt = args.prompt
        if prompt == "-":
            prompt = sys.stdin.buffer.read().decode("utf-8-sig").removesuffix("\n")
            prompt = prompt.removesuffix("\r")
        model = GPT.from_pretrained(args.model).to(device)
        model.h.to(getattr(torch, args.dtype))
        tokenizer = load_tokenizer(args.model)
        ids = tokenizer.encode(prompt)
    V, end = model.config.vocab_size, model.config.eos_token_id
    if len(tokenizer) > V:
        raise common.UserError(f"{args.model}: the tokenizer knows {len(tokenizer):,} tokens and "
                               f"the model {V:,}: they do not belong together")
    print(f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters on {device} in "
          f"{args.dtype}; tokens: {len(ids):,} of the prompt, up to {args.max_new_tokens:,} more",
          file=sys.stderr, flush=True)
    idx = torch.tensor([ids or [tokenizer.start]], device=device).expand(args.num_samples, -1)
    generator = torch.Generator("cpu" if device.type == "mps" else device).manual_seed(args.seed)
    choose = functools.partial(
        next_token, do_sample=not args.greedy, temperature=args.temperature, top_k=args.top_k,
        top_p=args.top_p, generator=generator)
    began, made = time.perf_counter(), 0

    def counted(row):  # the tokens of a row before its end
        nonlocal made
        for id in row:
            made += 1
            if id == end:
                return
            yield id

    tokens = model.stream(idx, args.max_new_tokens, choose, end)
    if args.num_samples == 1:
        rows = [(token.item() for token in tokens)]  # each printed as it is made
    else:
        bar = tqdm(tokens, total=args.max_new_tokens, unit=" tokens", disable=None)
        rows = torch.cat([idx[:, :0], *bar], dim=1).tolist()
    for i, row in enumerate(rows):
        print("---\n" if i else "", end="")
        print(tokenizer.decode(ids), end="", flush=True)
        texts = tokenizer.stream(counted(row))
        for text in up_to(texts, args.stop) if args.stop else texts:
            print(text, end="", flush=True)
        print()
    seconds = time.perf_counter() - began
    print(f"{made:,} tokens in {seconds:.1f} s: {made / seconds:.1f} tokens/s", file=sys.stderr)


@common.command("gpt.py")  # prints a common.UserError without its traceback
def main(argv=None):
    if isinstance(sys.stdout, io.TextIOWrapper):  # UTF-8 is not the default everywhere
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="gpt.py", description="Train a GPT, and write with it.",
                                     epilog="python gpt.py train --help lists the flags of train")
    parser.add_argument("command", choices=["train", "generate"])
    command = parser.parse_args(argv[:1]).command
    train(argv[1:]) if command == "train" else generate(argv[1:])


if __name__ == "__main__":
    main()
