"""Every test, and the benchmark.

    python test_all.py             all tests, without a network
    python test_all.py -k resume   those with "resume" in their name
    python test_all.py --bench     speed, beside the usual way (needs DATA_DIR and transformers)

DATA_DIR names a folder with the real MNIST (MNIST/raw/...), GPT-2's tokenizer (gpt2/vocab.json and
merges.txt) and tinyshakespeare.txt; RANDOM_STRINGS says how many the tokenizer is tried on. Tests
that miss these files, transformers or tiktoken are skipped, and say so.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import http.server
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import timeit
import types
import unicodedata
import unittest
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import aae
import common
import gpt
import vae

patch = mock.patch.object
HERE = Path(__file__).resolve().parent
DATA_DIR = Path(os.environ.get("DATA_DIR", "not given")).absolute()
needs_posix = unittest.skipUnless(os.name == "posix", "needs the links or processes of POSIX")
render_glyphs = functools.cache(common.render_glyphs)  # tests render them once
PICTURES = [(vae, "save_pictures", vae.save_pictures), (aae, "save_pictures", aae.save_pictures),
            (common, "save_curves", common.save_curves)]
POSTERIORS = ("deterministic", "gaussian", "universal")


def setUpModule():
    # The tests' models are small: several threads would mostly wait for one another.
    torch.set_num_threads(1)
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                   "TIKTOKEN_CACHE_DIR": ""}


def identical(a, b):
    """Fail unless two tensors, or two dicts or lists of tensors, are the same bit for bit."""
    assert_close(a, b, rtol=0, atol=0)


def read_rows(run):
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def run_script(script, *argv):
    """What `python script.py argv` does -> exit status, stdout, stderr"""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            common.run_script(lambda: script.main([str(word) for word in argv]))
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
    return status, out.getvalue(), err.getvalue()


def changed_copy(script, *changes):
    """-> the script as a module in which texts are replaced, as in a copy that somebody changes"""
    source = Path(script.__file__).read_text(encoding="utf-8")
    for before, after in changes:
        assert before in source, before
        source = source.replace(before, after)
    copy = types.ModuleType("changed_copy")
    exec(source, vars(copy))
    copy.save_pictures = lambda *_, **__: None
    return copy


class TemporaryFolder(unittest.TestCase):
    """Each test starts in an empty folder of its own. Scripts save no pictures, to save time."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.addCleanup(folder.cleanup)
        self.addCleanup(os.chdir, os.getcwd())  # called first: Windows removes no folder in use
        os.chdir(folder.name)
        torch.manual_seed(0)
        self.addCleanup(mock.patch.stopall)
        patch(common, "render_glyphs", render_glyphs).start()
        for owner, name, _ in PICTURES:
            patch(owner, name, lambda *_, **__: None).start()

    def succeed(self, script, *argv):
        """Run the script, which has to end with status 0. -> what it printed"""
        status, out, err = run_script(script, *argv)
        self.assertEqual(status, 0, err)
        return out

    def refuse(self, script, *argv, naming):
        """The script has to end with status 2 and a line that names something, and change no file
        but those with tokens, which the next run can use."""
        def files():
            return {path: path.stat().st_mtime_ns for path in Path().rglob("*.*")
                    if not path.match("data/tokens-*.bin")}

        before = files()
        status, out, err = run_script(script, *argv)
        self.assertEqual((status, out, files()), (2, "", before), argv)
        self.assertRegex(err.splitlines()[-1], f"error: .*{re.escape(naming)}")


class VAE(TemporaryFolder):
    def test_pixels_are_reduced_to_16_values_as_the_assignment_says(self):
        x = torch.arange(256, dtype=torch.uint8)
        identical(vae.to_4_bits(x), (x.double() / 255 * 16).floor().clamp(max=15).to(torch.uint8))
        with patch(vae, "NUM_VALUES", 256):
            identical(vae.to_4_bits(x), x)

    def test_kl_divergence_equals_that_of_torch_distributions(self):
        mean, log_std = torch.randn(2, 5, 3).double()
        q = torch.distributions.Normal(mean, log_std.exp())
        p = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        kl = torch.distributions.kl_divergence(q, p).sum(-1)
        assert_close(vae.kl_divergence(mean, log_std), kl)

    def test_reconstruction_loss_is_minus_the_log_probability_of_all_channels(self):
        logits, x = torch.randn(4, 16, 3, 9, 9), torch.randint(16, (4, 3, 9, 9))
        categorical = torch.distributions.Categorical(logits=logits.movedim(1, -1))
        expected = -categorical.log_prob(x).sum((1, 2, 3))
        assert_close(vae.reconstruction_loss(logits, x.to(torch.uint8)), expected)
        uniform = vae.reconstruction_loss(0 * logits, x)
        assert_close(vae.elbo_to_bpd(uniform, x.shape), torch.full((4,), 4.))  # log2(16) bits

    def test_the_loss_its_gradient_and_both_estimates_of_log_p_x_equal_numerical_integrals(self):
        mean, log_std = torch.tensor([0.3, -0.2], requires_grad=True)  # of q(z|x), for every x
        x, slopes = torch.randint(16, (8, 1, 2, 2)), torch.randn(64)  # logits are linear in z
        model = vae.VAE(z_dim=1, num_filters=4, image_size=2)
        model.encoder.forward = lambda x: (mean.expand(len(x), 1), log_std.expand(len(x), 1))
        model.decoder.forward = lambda z: (z * slopes).view(-1, 16, 1, 2, 2)

        z = torch.linspace(-8, 8, 4001).unsqueeze(1)
        dz = z[1, 0] - z[0, 0]
        log_q = torch.distributions.Normal(mean, log_std.exp()).log_prob(z.squeeze(1))
        log_joint = torch.distributions.Normal(0, 1).log_prob(z.squeeze(1)) - torch.stack([
            vae.reconstruction_loss(model.decoder(z), image.expand(4001, 1, 2, 2)) for image in x])
        log_p = log_joint.logsumexp(1) + dz.log()  # [8]
        bound = ((log_joint - log_q) * log_q.exp()).sum(1).mean() * dz

        loss = sum(model(x.repeat(5000, 1, 1, 1)))
        assert_close(loss, -bound, atol=0.04, rtol=0)
        gradients = (torch.autograd.grad(y, (mean, log_std)) for y in (loss, -bound))
        assert_close(*gradients, atol=0.1, rtol=0)
        for from_prior in (False, True):
            estimate = vae.log_likelihood(model, x, 4000, from_prior)
            assert_close(estimate, log_p.detach(), atol=0.1, rtol=0)

    def test_evaluation_weighs_every_image_equally_and_is_repeatable(self):
        images = vae.to_4_bits(render_glyphs()[0][:101])  # the last batch has one
        rec, kl = vae.evaluate(lambda x: (x.double().mean(), -x.double().mean()), images)
        self.assertAlmostEqual(rec, images.double().mean().item(), places=9)
        self.assertAlmostEqual(kl, -rec, places=9)
        model = vae.VAE(num_filters=4)
        self.assertEqual(vae.evaluate(model, images), vae.evaluate(model, images))

    def test_log_std_is_bounded_and_keeps_a_gradient_near_the_bounds(self):
        encoder = vae.Encoder(z_dim=4)
        nn.init.zeros_(encoder.log_std.weight)
        encoder.log_std.bias.data = torch.tensor([1., 100, -100, 15])
        _, log_std = encoder(torch.zeros(1, 1, 28, 28))
        assert_close(log_std, torch.tensor([[1., 5, -5, 5]]), atol=0.03, rtol=0)
        log_std.sum().backward()
        self.assertGreater(encoder.log_std.bias.grad[3].item(), 1e-3)  # of 15

    def test_samples_follow_the_prior_and_the_decoders_categorical_distribution(self):
        model, logits, latents = vae.VAE(z_dim=2, num_filters=4, channels=2), torch.randn(16, 2), []
        model.decoder.register_forward_hook(lambda _, inputs, __: latents.append(inputs[0]))
        nn.init.zeros_(model.decoder.net[-2].weight)  # so each pixel of a channel has these logits
        model.decoder.net[-2].bias.data = logits.flatten()
        x = model.sample(300).movedim(1, -1)  # [300, 28, 28, 2]
        shares = F.one_hot(x, 16).double().mean((0, 1, 2))  # [2, 16]
        assert_close(shares, logits.T.softmax(1).double(), atol=0.005, rtol=0)
        assert_close(latents[0].T.cov(), torch.eye(2), atol=0.3, rtol=0)

    def test_the_plane_of_latents_shows_the_priors_percentiles_growing_right_and_up(self):
        decoder, rows = vae.Decoder(z_dim=2, num_filters=4), []
        decoder.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0]))
        self.assertEqual(vae.visualize_manifold(decoder, 3).shape, (9, 1, 28, 28))
        percentiles = torch.distributions.Normal(0, 1).cdf(torch.stack(rows))  # [3, 3, 2]
        expected = [[[x, y] for x in (1 / 6, 1 / 2, 5 / 6)] for y in (5 / 6, 1 / 2, 1 / 6)]
        assert_close(percentiles, torch.tensor(expected), atol=1e-5, rtol=0)


class AAE(TemporaryFolder):
    def test_autoencoder_and_discriminator_losses_equal_their_formulas_for_any_lambda(self):
        model, x = aae.AdversarialAE(), aae.to_float(render_glyphs()[0][:64])
        recon, z = model(x)
        D = model.discriminator(z).sigmoid()
        for lam in (0, 0.3, 1):
            loss, rec, gen = model.autoencoder_loss(x, recon, z, lam)
            assert_close(rec, ((recon - x)**2).sum() / (64 * 784))
            assert_close(gen, -D.log().mean())
            assert_close(loss, lam * rec + (1 - lam) * gen)
        prior = torch.randn_like(z)
        with patch(aae, "sample_prior", lambda *_: prior):
            disc, accuracy = model.discriminator_loss(z)
            identical(model.sample(64), model.decoder(prior).detach())
        D_prior = model.discriminator(prior).sigmoid()
        assert_close(disc, -(D_prior.log() + (1 - D).log()).mean() / 2)
        self.assertEqual(accuracy, ((D_prior > 0.5).sum() + (D <= 0.5).sum()) / 128)

    @torch.no_grad()
    def test_deterministic_codes_repeat_and_gaussian_codes_have_the_encoders_mean_and_std(self):
        x = torch.rand(1, 1, 28, 28).expand(5_000, -1, -1, -1)
        for posterior in POSTERIORS:
            spread = aae.Encoder(2, posterior)(x[:200]).std(0)
            self.assertEqual((spread > 1e-3).tolist(), [posterior != "deterministic"] * 2)
        encoder = aae.Encoder(2, "gaussian")
        encoder.out.weight.zero_()
        encoder.out.bias.copy_(torch.tensor([1., -2., math.log(0.5), 0.]))  # mean, log std
        z = encoder(x)
        assert_close(z.mean(0), torch.tensor([1., -2]), atol=0.06, rtol=0)
        assert_close(z.std(0), torch.tensor([0.5, 1]), atol=0.05, rtol=0)
        encoder.out.bias.fill_(1e4)  # whose exp is infinite
        self.assertTrue(encoder(x[:10]).isfinite().all())

    def test_the_sliced_wasserstein_distance_has_its_closed_form_values(self):
        a, distance = torch.randn(20_000, 1), aae.sliced_wasserstein
        self.assertAlmostEqual(distance(a, a + 0.7), 0.7, places=5)  # a shift
        self.assertAlmostEqual(distance(a, a.flip(0)), 0, places=6)  # the same set
        a = torch.randn(2000, 2)
        shifted = distance(a, a + torch.tensor([3., 4]), 10_000)  # 5 times the mean of |cos|
        self.assertAlmostEqual(shifted, 5 * 2 / math.pi, delta=0.05)

    def test_the_distance_relative_to_draws_of_the_prior_is_near_1_only_for_such_draws(self):
        generator = torch.Generator()  # evaluate seeds torch's own, and draws the prior from it
        images = render_glyphs()[0][:2001]  # the last batch has one
        patch(aae, "sample_prior", lambda n, z_dim, _: 7 + 0.01 * torch.randn(n, z_dim)).start()
        for spread, low, high in ((0.01, 0.8, 1.25), (0.012, 3, 20)):
            def model(x, spread=spread):  # images come back as zeros
                codes = 7 + spread * torch.randn(len(x), 8, generator=generator)
                return torch.zeros_like(x), codes

            mse, distance = aae.evaluate(model, images)
            self.assertTrue(low < distance < high, (spread, distance))
            self.assertAlmostEqual(mse, (aae.to_float(images)**2).mean().item(), places=5)
        model = aae.AdversarialAE(posterior="gaussian", num_filters=4)
        self.assertEqual(aae.evaluate(model, images), aae.evaluate(model, images))


class Common(TemporaryFolder):
    @unittest.skipUnless(hasattr(torch.optim, "Muon"), "this torch has no Muon")
    def test_muon_equals_torch_optim_muon_and_takes_convolution_kernels_as_matrices(self):
        ours = [nn.Parameter(torch.randn(shape)) for shape in ((40, 6, 2, 2), (24, 20, 2, 1))]
        before = [weight.detach().flatten(1).clone() for weight in ours]  # tall and wide
        theirs = [nn.Parameter(weight.clone()) for weight in before]
        a = common.Muon(ours, lr=0.1, weight_decay=0.1)
        b = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            for x, y in zip(ours, theirs, strict=True):
                x.grad = torch.randn_like(x)
                y.grad = x.grad.flatten(1).clone()
            a.step()
            b.step()
        for x, y, first in zip(ours, theirs, before, strict=True):  # torch's is in bfloat16
            self.assertLess((x.flatten(1) - y).norm(), 0.01 * (y - first).norm())

    def test_muon_takes_a_closure_and_any_iterable_and_skips_weights_without_gradient(self):
        weights = [nn.Parameter(torch.ones(3, 2)) for _ in range(3)]
        optimizer = common.Muon((weight for weight in weights), lr=0.1, weight_decay=0.1)

        def closure():
            loss = sum((weight**2).sum() for weight in weights[:2])  # none for the third
            loss.backward()
            return loss.detach()

        self.assertEqual(optimizer.step(closure).item(), 12)
        moved = [bool((weight != 1).all()) for weight in weights]
        self.assertEqual((moved, optimizer.step()), ([True, True, False], None))

    @unittest.skipUnless(torch.cuda.is_available(), "no GPU")
    def test_a_step_replayed_from_a_cuda_graph_equals_the_step_run_directly(self):
        def losses(record):
            torch.manual_seed(0)
            weight, lr = torch.randn(5, 5).cuda().requires_grad_(), torch.zeros((), device="cuda")
            optimizer = common.Muon([weight], lr, weight_decay=0.1)

            @record
            def step(x):
                loss = (x @ weight + torch.randn_like(x)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                return loss.detach()

            for i in range(12):  # two shapes, each recorded at its fourth call
                lr.fill_(0.1 / (i + 1))
                yield step(torch.full((4 + i % 2, 5), 1.0 + i, device="cuda"))

        recorded, direct = losses(common.cuda_graph), losses(lambda step: step)
        assert_close(torch.stack([*recorded]), torch.stack([*direct]), rtol=1e-5, atol=0)

    def test_the_result_of_a_recorded_cuda_graph_survives_the_next_call(self):
        with patch(torch.cuda, "CUDAGraph"), patch(torch.cuda, "graph"):
            step = common.cuda_graph(lambda x: x + 1)  # a stand-in, which replays nothing
            results = [step(torch.ones(2)) for _ in range(6)]
        self.assertEqual(len({result.data_ptr() for result in results}), 6)

    def test_two_runs_never_share_a_folder_even_if_they_start_at_the_same_moment(self):
        Path("runs/a").mkdir(parents=True)
        for expected in ("a", "a-2", "a-3"):  # the first was there, but empty
            self.assertEqual(common.new_run_folder("runs/a"), Path("runs", expected))
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            self.assertEqual(len(set(pool.map(common.new_run_folder, ["b"] * 20))), 20)
            # All threads have the same process number, like the processes of several containers.
            [*pool.map(common.write_json, ["c.json"] * 20, range(20))]  # none spoils another's
        self.assertRaises(FileExistsError, common.new_run_folder, "c.json")  # is no endless loop

    def test_paths_may_start_with_a_tilde_or_end_with_a_slash(self):
        with mock.patch.dict(os.environ, HOME=os.getcwd(), USERPROFILE=os.getcwd()):
            self.assertEqual(common.absolute_path("~/run"), os.path.abspath("run"))
        self.assertEqual(common.absolute_path("run/"), os.path.abspath("run"))

    def test_scripts_print_any_character_whatever_the_encoding_of_the_terminal(self):
        with patch(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252")) as out:
            common.run_script(lambda: print("фото \udcff", flush=True))
        self.assertEqual(out.buffer.getvalue().decode(), f"фото \\udcff{os.linesep}")

    def test_a_file_is_written_whole_or_not_at_all_and_code_in_a_pickle_is_not_run(self):
        checkpoint = {"model": {"w": torch.arange(1000.)}, "args": {"script": "vae.py"}}
        common.save_checkpoint(Path("last.pt"), checkpoint)
        with self.assertRaises(ZeroDivisionError):  # a stop in the middle
            common.save(Path("last.pt"), lambda file: file.write(b"half") / 0)
        identical(common.load_checkpoint(Path("last.pt"), "vae.py")["model"], checkpoint["model"])
        Harm = type("Harm", (), {"__reduce__": lambda self: (open, ("harm", "w"))})
        torch.save(checkpoint | {"x": Harm()}, "last.pt")
        self.refuse(vae, "--resume", ".", naming="last.pt")  # the file "harm" is not there either


def load(*argv):
    """-> args and images, as the image scripts load them"""
    parser = argparse.ArgumentParser(prog="test")
    common.add_image_flags(parser, batch_size=1)
    common.add_run_flags(parser)
    args = parser.parse_args([str(word) for word in argv])
    return args, common.load_images(args, torch.device("cpu"))


def write_pictures(folder):
    """40 pictures, in folder a and b in turn: the i-th is grey, 5 i, in its lower half, and has red
    250 in the upper one."""
    for i in range(40):
        path = Path(folder, "ab"[i % 2], f"{i:02d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((20, 24, 3), 5 * i, dtype=np.uint8)
        pixels[:10] = 250, 5 * i, 5 * i
        Image.fromarray(pixels).save(path)


class Images(TemporaryFolder):
    def test_every_weight_gets_a_gradient_for_any_image_shape_and_other_input_is_refused(self):
        for channels, size in ((1, 28), (3, 32), (3, 64), (1, 45), (4, 17), (2, 8)):
            for posterior in (None, *POSTERIORS):  # None: a VAE
                integers = torch.randint(16, (3, channels, size, size), dtype=torch.uint8)
                if posterior is None:
                    x, other = integers, integers.float()
                    model = vae.VAE(5, 4, channels, size)
                    loss = sum(model(x))
                else:
                    x, other = integers / 15, integers
                    model = aae.AdversarialAE(5, posterior, 4, channels, size)
                    loss, *_ = model.autoencoder_loss(x, *model(x), 0.995)
                loss.backward()
                for name, parameter in model.named_parameters():
                    self.assertGreater(parameter.grad.abs().sum().item(), 0, (posterior, name))
                self.assertEqual(model.sample(2).shape, (2, channels, size, size))
                for wrong in (other, x[:, 1:], x[..., 1:], x[:, 0]):
                    self.assertRaises(AssertionError, model, wrong)

    def test_digits_drawn_from_fonts_are_the_same_every_time_with_all_ten_labels(self):
        images, labels = render_glyphs()
        identical((images, labels), render_glyphs.__wrapped__())
        self.assertGreater(torch.bincount(labels, minlength=10).min().item(), 6000)

    def test_the_split_into_train_val_and_test_is_fixed_and_limit_keeps_the_first_of_each(self):
        _, splits = load("--dataset", "glyphs", "--seed", 1)  # the split has a seed of its own
        generator = torch.Generator().manual_seed(42)
        order = torch.randperm(60_000, generator=generator)
        order = torch.cat([order, 60_000 + torch.randperm(10_000, generator=generator)])
        all_images, all_labels = render_glyphs()
        identical(torch.cat([images for images, _ in splits]), all_images[order])
        identical(torch.cat([labels for _, labels in splits]), all_labels[order])
        self.assertEqual([len(labels) for _, labels in splits], [54_000, 6000, 10_000])
        _, few = load("--dataset", "glyphs", "--limit", 100)
        for some, (images, labels), n in zip(few, splits, (100, 10, 10), strict=True):
            identical(some, (images[:n], labels[:n]))

    @unittest.skipUnless((DATA_DIR / "MNIST/raw").is_dir(), "DATA_DIR has no MNIST")
    def test_mnist_is_read_and_a_damaged_file_is_named_and_never_replaced_by_glyphs(self):
        args, (_, _, (test, _)) = load("--data-dir", DATA_DIR)
        self.assertEqual((args.dataset, len(test)), ("mnist", 10_000))
        self.assertAlmostEqual(test.double().mean().item(), 33.791, places=3)
        shutil.copytree(DATA_DIR / "MNIST/raw", "data/MNIST/raw")
        path = Path("data/MNIST/raw/t10k-images-idx3-ubyte")
        content = path.read_bytes()
        for damaged in (content[:-1000], b"", b"no image" + content):
            path.write_bytes(damaged)
            with self.assertRaisesRegex(common.UserError, "data/MNIST/raw cannot be read"):
                load()

    def test_without_a_network_glyphs_replace_mnist_unless_a_dataset_or_folder_was_named(self):
        from torchvision import datasets

        patch(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"]).start()
        with contextlib.redirect_stderr(io.StringIO()) as err:
            args, _ = load("--limit", 10)
        self.assertEqual(args.dataset, "glyphs")
        self.assertRegex(err.getvalue(), "warning: .*MNIST/raw .*[Rr]efused")  # the reason
        for argv in (["--dataset", "mnist"], ["--data-dir", "other"]):
            self.assertRaisesRegex(common.UserError, "MNIST/raw", load, *argv)

    def test_own_pictures_are_read_in_colour_and_labelled_by_their_folders(self):
        write_pictures("photos")
        _, splits = load("--dataset", "photos", "--image-size", 16)
        for (images, labels), n in zip(splits, (32, 4, 4), strict=True):
            self.assertEqual(images.shape, (n, 3, 16, 16))
            # 5 * i in the lower half; odd i lie in the second folder.
            identical(images[:, 2, -1, 0] // 5 % 2, labels.to(torch.uint8))
            self.assertTrue((images[:, 0, 0] == 250).all())

    @needs_posix
    def test_linked_folders_are_read_once_and_hidden_files_skipped_and_broken_links_named(self):
        write_pictures("elsewhere")
        Path("photos").mkdir()
        for target, name in (("../elsewhere/a", "a"), ("../photos", "loop"), ("no", "broken.png")):
            os.symlink(target, f"photos/{name}")
        for name in (".ipynb_checkpoints/1.png", ".DS_Store", "._1.png", "b/.hidden.png"):
            Path("photos", name).parent.mkdir(exist_ok=True)
            shutil.copy("elsewhere/b/01.png", Path("photos", name))
        with contextlib.redirect_stderr(io.StringIO()) as err:
            images, labels, _ = common.read_pictures("photos", 8)
        self.assertEqual((len(images), labels.unique().tolist()), (20, [0]))
        self.assertRegex(err.getvalue(), "^warning: photos/broken.png is left out .*\n$")

    def test_palette_alpha_16_bit_and_rotated_pictures_load_as_a_viewer_shows_them(self):
        pixels = np.zeros((40, 40, 3), dtype=np.uint8)
        pixels[:20] = 200  # light above, dark below
        picture, light, turned = Image.fromarray(pixels), pixels[..., 0], Image.Exif()
        turned[0x0112] = 6  # "turn it by 90 degrees", as a phone writes it
        picture.rotate(90).save("turned.jpg", exif=turned)
        for mode in ("LA", "RGBA"):  # black; over white the upper half looks like 200
            icon = Image.new(mode, (40, 40))
            icon.putalpha(Image.fromarray(255 - light))
            icon.save(f"{mode}.png")
        picture.convert("P").save("palette.png")
        Image.fromarray(light.astype(np.uint16) * 256).save("16 bits.png")
        for name in ("a.jpg", "b.JPEG", "c.webp", "d.gif", "e.bmp", "f.png"):
            picture.save(name)
        for kind in (np.int32, np.float32):
            Image.fromarray(light.astype(kind)).save(f"{kind.__name__}.tif")
        Path("broken.png").write_bytes(b"broken")
        with contextlib.redirect_stderr(io.StringIO()) as err:
            images, _, _ = common.read_pictures(".", 8)
        self.assertRegex(err.getvalue(), r"(?s)broken.png.*float32.tif.*mode F.*int32.tif.*mode I ")
        expected = torch.tensor([200.] * 4 + [0] * 4).view(1, 1, 8, 1).expand(11, 1, 8, 8)
        away = torch.tensor([0, 1, 2, 5, 6, 7])  # from the edge, which JPEG blurs
        assert_close(images.float()[:, :, away], expected[:, :, away], atol=8, rtol=0)


TOKENS = torch.randint(61, (5, 24), generator=torch.Generator().manual_seed(0))


def small_gpt(**changes):
    """The same GPT each time, in float64. Its attention is far from uniform, as after training."""
    config = dict(vocab_size=61, block_size=24, n_layer=3, n_head=4, n_embd=32) | changes
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(**config)).double()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


class GPTModel(TemporaryFolder):
    def test_attention_is_causal_and_the_loss_is_the_cross_entropy_of_the_targets(self):
        for fused in (True, False):
            model, targets = small_gpt(fused=fused), (TOKENS + 1) % 61
            logits, loss = model(TOKENS, targets)
            changed = torch.cat([TOKENS[:, :12], targets[:, 12:]], 1)
            same = (model(changed)[0] - logits).abs().amax((0, 2)) < 1e-9  # [T]
            self.assertEqual(same.tolist(), [True] * 12 + [False] * 12)
            of_targets = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1))
            assert_close(loss, -of_targets.mean())

    def test_fused_and_plain_attention_agree_in_values_gradients_and_dropout(self):
        q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64).requires_grad_()
        some = torch.rand(5, 9) < torch.tensor([1] + [0.5] * 8)  # each sees the first at least
        for query, mask in ((q, None), (q[:, :, :5], some)):
            results = []
            for fused in (True, False):
                y = gpt.attention(query, k, v, mask, fused=fused)
                results.append([y, *torch.autograd.grad(y.square().sum(), [query, k, v])])
            assert_close(*results, rtol=1e-9, atol=1e-12)
        results = [gpt.attention(*torch.ones(3, 1000, 1, 30, 8), dropout_p=0.5, fused=fused)
                   for fused in (True, False)]  # mean 1
        assert_close(results[0].std(), results[1].std(), rtol=0.05, atol=0)
        assert_close(results[0].mean(), results[1].mean(), rtol=0.02, atol=0)

    def test_a_new_gpt_is_initialized_with_the_standard_deviations_of_gpt2(self):
        model = gpt.GPT(gpt.GPTConfig(1000, 64, n_layer=8, n_head=4, n_embd=128))
        for name, w in model.named_parameters():
            if w.dim() == 2:
                std = 0.01 if name == "wpe.weight" else 0.02
                std /= 4 if name.endswith("c_proj.weight") else 1  # sqrt(2 * n_layer)
                self.assertAlmostEqual(w.std().item() / std, 1, delta=0.05, msg=name)
            else:
                self.assertTrue((w == (1 if name.endswith("weight") else 0)).all(), name)

    def test_generated_text_is_the_same_with_and_without_the_cache_also_past_the_block_size(self):
        def rubbish(*size, **options):  # in places of the cache that are not used yet
            return torch.full(size, 100.0, **options)

        for fused, B, T, sampling in (
                (True, 5, 1, {}), (True, 1, 7, {"temperature": 1.5}), (True, 5, 24, {"top_k": 5}),
                (True, 5, 40, {"top_p": 0.9}), (False, 5, 7, {"do_sample": False})):
            model, prompt = small_gpt(fused=fused), TOKENS.repeat(1, 2)[:B, :T]
            expected = prompt
            torch.manual_seed(1)
            for _ in range(45):  # a pass over the whole window for each token
                logits = model(expected[:, -24:])[0][:, -1].detach()
                expected = torch.cat([expected, gpt.next_token(logits, **sampling)], dim=1)
            for zeros in (torch.zeros, rubbish):
                torch.manual_seed(1)
                with patch(torch, "zeros", zeros):
                    identical(model.generate(prompt, 45, **sampling), expected)
        with torch.autocast("cpu", torch.bfloat16):  # the cache is in float32
            self.assertEqual(small_gpt().float().generate(TOKENS, 9).shape, (5, 33))

    def test_rotary_positions_added_to_q_and_k_work_with_the_cache_too(self):
        def turn(x, positions):  # rotary positions, one frequency for all pairs
            angle, (left, right) = 0.3 * positions[:, None], x.chunk(2, dim=-1)
            return torch.cat([left * angle.cos() - right * angle.sin(),
                              left * angle.sin() + right * angle.cos()], dim=-1)

        rotary = changed_copy(gpt, ("q, k, v = qkv\n", "q, k, v = qkv\n"
                                    "        q, k = turn(q, positions), turn(k, positions)\n"))
        rotary.turn = turn
        with patch(gpt, "GPT", rotary.GPT):
            for model in (small_gpt(), small_gpt(fused=False)):
                expected = TOKENS[:, :7]
                for _ in range(30):  # past the block
                    token = model(expected[:, -24:])[0][:, -1].argmax(-1, keepdim=True)
                    expected = torch.cat([expected, token], dim=1)
                identical(model.generate(TOKENS[:, :7], 30, do_sample=False), expected)

    def test_sampling_follows_the_softmax_or_is_greedy_and_top_k_and_top_p_truncate_it(self):
        p, two, greedy = [0.09, 0.5, 0.41], [0, 0.5, 0.41], [0, 1, 0]
        for probs, sampling, expected in (  # up to a factor
                (p, {}, p), (p, {"temperature": 2}, [0.3, 0.707, 0.64]),  # square roots
                (p, {"temperature": 0.5}, [0.0081, 0.25, 0.1681]), (p, {"temperature": 0}, greedy),
                (p, {"temperature": 1e-40}, greedy), (p, {"do_sample": False}, greedy),
                (p, {"top_k": 1}, greedy), (p, {"top_k": 2}, two), (p, {"top_p": 0}, greedy),
                (p, {"top_p": 0.4}, greedy), (p, {"top_p": 0.51}, two), (p, {"top_p": 0.9}, two),
                (p, {"top_p": 0.92}, p), ([0.5, 0.25, 0.25], {"top_p": 0.5}, [1, 0, 0]),
                (p, {"top_k": 2, "top_p": 0.54}, greedy),  # 0.5 / 0.91 = 0.55
                ([0.25] * 4, {"top_k": 0}, [1] * 4), ([0.25] * 4, {"top_k": 10**6}, [1] * 4)):
            torch.manual_seed(0)
            tokens = gpt.next_token(torch.tensor(probs).log().expand(20_000, -1), **sampling)
            shares = torch.bincount(tokens.flatten(), minlength=len(probs)) / 20_000
            expected = torch.tensor(expected) / sum(expected)
            assert_close(shares, expected, atol=0.02, rtol=0)
            self.assertEqual(shares.count_nonzero(), expected.count_nonzero(), sampling)
        for sampling in ({"top_k": 3}, {"top_p": 0.75}):  # three of four equal ones
            tokens = gpt.next_token(torch.zeros(2000, 4), **sampling)
            self.assertEqual(len(tokens.unique()), 3)


def import_transformers(test):
    """-> the module, or skip the test"""
    try:
        import transformers
        from transformers import GPT2LMHeadModel  # noqa: F401 - not there with an older torch
    except ImportError:
        test.skipTest("transformers is not installed, or too new for this torch")
    return transformers


def byte_tokenizer(*merges, special=()):
    """A vocabulary of bytes, as GPT-2 writes them (Ġ: a space, Ċ: \\n, č: \\r), merges and more"""
    visible = {*range(33, 127), *range(161, 256)} - {173}
    hidden = [byte for byte in range(256) if byte not in visible]
    tokens = [chr(byte if byte in visible else 256 + hidden.index(byte)) for byte in range(256)]
    tokens += [*(merge.replace(" ", "") for merge in merges), *special]
    vocab = {token: id for id, token in enumerate(tokens)}
    return gpt.BPETokenizer(vocab, [merge.split(" ") for merge in merges],
                            {text: vocab[text] for text in special})


class Tokenizers(TemporaryFolder):
    def test_byte_pairs_merge_by_rank_and_from_left_to_right(self):
        tokenizer = byte_tokenizer("b c", "a a", "a b", "aa a", "Ġ a", "bc bc")
        for text, expected in (("abc", "a bc"), ("ab", "ab"), ("aaaaa", "aa aaa"), ("aab", "aa b"),
                               ("bcbcbc", "bcbc bc"), (" a ab", "Ġa Ġ ab"), ("a" * 7, "aa aa aaa"),
                               ("", ""), ("bb", "b b")):
            ids = tokenizer.encode(text)
            self.assertEqual([list(tokenizer.vocab)[id] for id in ids], expected.split(), text)
            self.assertEqual(tokenizer.decode(ids), text)

    def test_special_tokens_become_one_id_and_the_longest_match_wins(self):
        plain = byte_tokenizer()
        self.assertEqual((plain.end_of_text, plain.start, len(plain)), (None, 10, 256))
        tokenizer = byte_tokenizer(special=("<|endoftext|>", "<|user|>", "<|user|>!", "user"))
        self.assertEqual((tokenizer.end_of_text, tokenizer.start, len(tokenizer)), (256, 256, 260))
        text, ids = " <|user|><|user|>!<|user<|endoftext|>", [32, 257, 258, *b"<|", 259, 256]
        self.assertEqual((tokenizer.encode(text), tokenizer.decode(ids)), (ids, text))

    def test_streamed_text_comes_in_whole_characters_and_wrong_ids_become_u_fffd(self):
        for ids, parts in ((b"n\n", "n|\n|"), ("é".encode(), "|é|"), ("😀".encode(), "|||😀|"),
                           ([0xff, 10**9], "\ufffd|\ufffd|"), ([0xc3, 0x28], "|\ufffd(|"),
                           ([0xc3], "|\ufffd")):  # the last part comes after all ids
            self.assertEqual("|".join(byte_tokenizer().stream(ids)), parts)

    @unittest.skipUnless(find_spec("tiktoken"), "tiktoken is not installed")
    @unittest.skipUnless((DATA_DIR / "gpt2").is_dir(), "DATA_DIR has no GPT-2 tokenizer")
    def test_token_ids_equal_those_of_tiktoken_also_for_random_strings(self):
        import tiktoken.load

        folder, generator = DATA_DIR / "gpt2", random.Random(0)
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(f"{folder}/merges.txt",
                                                              f"{folder}/vocab.json")
        theirs = tiktoken.Encoding(
            "gpt2", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}, pat_str=
            r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
        ours = gpt.load_tokenizer(folder)
        assigned = [c for c in map(chr, range(sys.maxunicode + 1))
                    if unicodedata.category(c) not in ("Cn", "Cs")]
        hard = [*" \t\n\r\f\x1c\x85\xa0\u2028'sdmtlrevSL01½²Ⅷ_aé\u0301\u200d日", "<|endoftext|>"]
        texts = [path.read_text(encoding="utf-8") for path in DATA_DIR.glob("tinyshakespeare.txt")]
        for _ in range(int(os.environ.get("RANDOM_STRINGS", 5_000))):
            pool = generator.choice([assigned, assigned[:3000], assigned[:128], hard])
            texts.append("".join(generator.choices(pool, k=generator.randrange(40))))
        for text in texts:
            ids = ours.encode(text)
            self.assertTrue(ids == theirs.encode(text, allowed_special="all"), text[:99])
            self.assertEqual(ours.decode(ids), text)

    def test_a_text_tokenized_in_pieces_has_the_tokens_of_the_whole_and_limit_shortens_it(self):
        tokenizer = byte_tokenizer("Ġ Ġ", "Ċ Ċ", "č Ċ", "Ċ Ġ", "a b", "Ġ a", special=["<|"])
        for white in (" ", "\n", "\r\n", "\n\n\n", "  \x1c\n", "\x1c", "\u3000\x85\n", ""):
            parts = ["abab", "a", "1", "!", "é😀", "'s", "<|", " ", white, white, white]
            text = "".join(random.Random(0).choices(parts, k=400))
            Path("text").write_text(text, encoding="utf-8", newline="")
            for size in (1, 7, 50):
                blocks = list(gpt.read_blocks("text", limit=None, size=size))
                tokens = [id for block in blocks for id in tokenizer.encode(block)]
                self.assertEqual(tokens, tokenizer.encode(text), (white, size))
                self.assertGreater(sum(map(bool, blocks)), 5)  # not all in one block
            self.assertEqual("".join(gpt.read_blocks("text", limit=77, size=10)), text[:77])

    def test_the_character_tokenizer_has_an_id_for_each_character_and_decodes_them(self):
        gpt.CharTokenizer("\n abcé").save(".")
        tokenizer = gpt.load_tokenizer(".")
        self.assertEqual((len(tokenizer), tokenizer.start), (6, 0))
        self.assertEqual(tokenizer.encode("cab\né"), [4, 2, 3, 0, 5])
        self.assertEqual(list(tokenizer.stream([4, 2, 0, 99])), ["c", "a", "\n", "\ufffd"])
        self.assertRaisesRegex(ValueError, "dx", tokenizer.encode, "axbxd")

    def test_tokenizer_json_is_preferred_to_other_files_and_unknown_settings_are_refused(self):
        byte_tokenizer().save(".")  # three files that are not read
        token, own = {"id": 258, "content": "<|a b|>"}, byte_tokenizer("a b", "ab c")
        model = {"type": "BPE", "vocab": own.vocab, "merges": own.merges}
        whole = {"added_tokens": [token], "model": model, "pre_tokenizer": {"type": "ByteLevel"}}
        for merges in (own.merges, ["a b", "ab c"]):  # both are in use
            common.write_json("tokenizer.json", whole | {"model": model | {"merges": merges}})
            self.assertEqual(gpt.load_tokenizer(".").encode("abc<|a b|>"), [257, 258])
        for part, change in (
                ("normalizer", {"type": "NFC"}), ("pre_tokenizer", None),
                ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}),
                ("post_processor", {"type": "BertProcessing"}),
                ("model", model | {"byte_fallback": True}),
                ("added_tokens", [token | {"lstrip": True}])):
            common.write_json("tokenizer.json", whole | {part: change})
            self.assertRaisesRegex(common.UserError, part[:5], gpt.load_tokenizer, ".")


def write_folder(folder, tokenizer, **changes):
    """small_gpt() and its tokenizer, in a folder as on the hub"""
    Path(folder).mkdir(parents=True)
    gpt.save_model(small_gpt(**changes), folder)
    tokenizer.save(folder)


class Pretrained(TemporaryFolder):
    def setUp(self):
        super().setUp()
        write_folder("m", byte_tokenizer("a b"))

    @unittest.skipUnless(find_spec("safetensors"), "safetensors is not installed")
    def test_weights_load_under_every_name_that_public_files_use(self):
        from safetensors.torch import save_file

        named = dict(gpt.read_tensors(Path("m/model.safetensors")))
        bare = {name.removeprefix("transformer."): w.clone() for name, w in named.items()}
        more = {"h.0.attn.bias": torch.ones(1, 1, 24, 24, dtype=torch.bool),
                "h.1.attn.masked_bias": torch.tensor(-1e4), "lm_head.weight": bare["wte.weight"]}
        only_head = {name: w for name, w in (bare | more).items() if name != "wte.weight"}
        # If there is a whole file, an index of several is not read.
        common.write_json("m/model.safetensors.index.json", {"weight_map": {"wte": "none"}})
        for saved in (bare, bare | more, only_head):
            save_file({name: w.clone() for name, w in saved.items()}, "m/model.safetensors")
            identical(gpt.GPT.from_pretrained("m").state_dict(), small_gpt().float().state_dict())

    @torch.no_grad()
    def test_an_untied_output_layer_is_kept_and_a_class_without_one_refuses_it(self):
        layer = "self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)"
        Untied = changed_copy(gpt, ("# Normal, as in", f"{layer}\n        # Normal, as in"),
                              ("F.linear(x, self.wte.weight)", "self.lm_head(x)")).GPT
        with patch(gpt, "GPT", Untied):
            saved = small_gpt().float()
        gpt.save_model(saved, "m")
        identical(Untied.from_pretrained("m").state_dict(), saved.state_dict())
        self.refuse(gpt, "generate", "--model", "m", naming="a class with lm_head")
        theirs = import_transformers(self).GPT2LMHeadModel.from_pretrained("m").eval()
        assert_close(theirs(TOKENS).logits, saved(TOKENS)[0], rtol=1e-3, atol=1e-4)

    def test_missing_or_truncated_weights_are_named_and_the_message_says_what_to_do(self):
        path = Path("m/model.safetensors")
        content = path.read_bytes()
        for size in (0, 5, 8, 300, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            self.refuse(gpt, "generate", "--model", "m", naming="model.safetensors is incomplete")
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 548105171")
        self.refuse(gpt, "generate", "--model", "m", naming="git lfs pull")
        path.unlink()
        self.refuse(gpt, "generate", "--model", "m", naming="save_pretrained")

    def test_saving_and_loading_keep_all_weights_and_a_subclass_loads_as_itself(self):
        Own = type("Own", (gpt.GPT,), {})
        saved = small_gpt(fused=False, dropout=0.1, eos_token_id=[3, 7], bos_token_id=5).float()
        gpt.save_model(saved, "m")
        model = Own.from_pretrained("m")
        self.assertEqual((type(model), model.training, model.config), (Own, False, saved.config))
        identical(model.state_dict(), saved.state_dict())

    def test_a_model_that_is_not_a_gpt2_is_refused_and_the_difference_named(self):
        config = json.loads(Path("m/config.json").read_text())
        for name, value, naming in (
                ("model_type", "gpt_neo", "model_type"), ("activation_function", "relu", "relu"),
                ("layer_norm_epsilon", 1e-6, "epsilon"),
                ("n_layer", 4, "h.3.ln_1.bias"), ("n_layer", 2, "h.2.ln_1.bias")):
            common.write_json("m/config.json", config | {name: value})
            self.refuse(gpt, "generate", "--model", "m", naming=naming)

    @torch.no_grad()
    def test_six_models_of_transformers_have_equal_logits_here_and_go_back_bit_identical(self):
        transformers = import_transformers(self)
        for V, T, n_layer, n_head, n_embd in (
                (97, 16, 1, 1, 8), (1000, 33, 2, 3, 48), (503, 128, 5, 2, 64), (61, 24, 3, 4, 32),
                (2048, 64, 4, 8, 128), (3, 5, 1, 2, 2)):
            theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
                vocab_size=V, n_positions=T, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                initializer_range=0.2)).bfloat16()
            theirs.save_pretrained(f"{V}", max_shard_size="100KB")  # several files, for most
            ours, idx = gpt.GPT.from_pretrained(f"{V}"), torch.randint(V, (2, T))
            assert_close(ours(idx)[0], theirs.eval().float()(idx).logits, rtol=1e-3, atol=1e-4)
            gpt.save_model(ours, "m")
            back = transformers.GPT2LMHeadModel.from_pretrained("m")
            identical(back.state_dict(), theirs.state_dict())

    def test_a_broken_download_leaves_no_file_and_a_complete_one_is_not_repeated(self):
        class Hub(http.server.SimpleHTTPRequestHandler):
            end = None

            def copyfile(self, source, output):
                output.write(source.read()[:self.end])

        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Hub, directory="hub"))
        self.addCleanup(server.server_close)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.shutdown)
        mock.patch.dict(os.environ, no_proxy="127.0.0.1",
                        HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}").start()
        patch(torch.hub, "get_dir", lambda: "cache").start()
        patch(sys, "stderr", io.StringIO()).start()  # where it says what is downloaded
        shutil.copytree("m", "hub/openai-community/gpt2/resolve/main")

        self.assertEqual(gpt.load_tokenizer("gpt2").encode("ab"), [256])
        Hub.end = -50
        self.assertRaises(ConnectionError, gpt.GPT.from_pretrained, "gpt2")
        Hub.end = None
        identical(gpt.GPT.from_pretrained("gpt2").state_dict(), small_gpt().float().state_dict())
        self.assertRaisesRegex(OSError, "me/none", gpt.GPT.from_pretrained, "me/none")  # a 404
        shutil.rmtree("hub")
        identical(gpt.GPT.from_pretrained("gpt2").state_dict(), small_gpt().float().state_dict())


class GenerateCommand(TemporaryFolder):
    LETTERS = "\n abcdefghijklmnopqrstuvwxyz"

    def setUp(self):
        super().setUp()
        write_folder("letters", gpt.CharTokenizer(self.LETTERS), vocab_size=28)
        write_folder("bytes", byte_tokenizer(special=("<|endoftext|>",)), vocab_size=257)

    def write(self, *argv, model="letters"):
        """-> the texts that `generate` prints"""
        return self.succeed(gpt, "generate", "--model", model, "--device", "cpu", *argv)

    def test_the_same_seed_writes_the_same_texts_and_other_seeds_and_samples_differ(self):
        for model, *half in (["letters"], ["bytes"], ["letters", "--half"]):
            first, again, other = (self.write("--prompt", "one", "--num-samples", 3, "--seed", seed,
                                              *half, model=model) for seed in (1, 1, 2))
            self.assertEqual(first, again)
            texts = f"{first}---\n{other}".split("\n---\n")
            self.assertEqual((len(set(texts)), {text[:3] for text in texts}), (6, {"one"}))

    def test_a_prompt_longer_than_the_block_is_cut_to_its_last_tokens_with_a_warning(self):
        argv = "generate", "--model", "letters", "--greedy", "--device", "cpu", "--prompt"
        status, out, err = run_script(gpt, *argv, "beginning " + "long " * 20)
        self.assertEqual((status, out[:20]), (0, "beginning long long "))
        self.assertRegex(err, "24 .* 110")
        self.assertEqual(out[10:], self.write("--temperature", 0, "--prompt", "long " * 20))

    def test_generation_stops_at_any_end_token_in_the_models_config(self):
        for ends, text in ((256, "xabc\n"), ([256, 99], "xab\n"), (None, "xabc<|endoftext|>d\n")):
            gpt.save_model(small_gpt(vocab_size=257, eos_token_id=ends), "bytes")
            tokens = torch.tensor([97, 98, 99, 256, 100]).view(5, 1, 1).expand(5, 2, 1)
            with patch(gpt, "next_token", side_effect=list(tokens)):
                out = self.write("--prompt", "\ufeffx", "--max-new-tokens", 5, "--num-samples", 2,
                                 model="bytes")
            self.assertEqual(out, f"{text}---\n{text}")

    def test_without_a_prompt_a_text_starts_from_the_models_start_token_or_a_newline(self):
        texts = [self.write("--greedy", "--prompt", letter)[1:] for letter in self.LETTERS[:8]]
        self.assertEqual(len(set(texts)), 8)
        for config, generation, start in ((5, {}, 5), (None, {}, 0), (99, {}, 0), (-1, {}, 0),
                                          (5, {"bos_token_id": 7}, 7)):
            gpt.save_model(small_gpt(vocab_size=28, bos_token_id=config), "letters")
            common.write_json("letters/generation_config.json", generation)
            self.assertEqual(self.write("--greedy"), texts[start])


# Flags of a short run: 15 steps in an epoch, or between two evaluations
IMAGES = "--dataset glyphs --limit 300 --batch-size 20 --num-filters 4 --device cpu"
SHORT = {vae: IMAGES, aae: IMAGES, gpt: "train --text text.txt --n-layer 2 --n-embd 32 "
         "--block-size 16 --eval-every 15 --device cpu"}


def write_text():
    """Write text.txt, 5,000 characters in threes, which a model learns in a few steps. -> it"""
    text = "".join(random.Random(0).choices(["abc", " de", "fg\n", "gab"], k=1667))[:5000]
    Path("text.txt").write_text(text, newline="")
    return text


def short_argv(script, epochs, *more, resume=None):
    length = f"--max-steps={15 * epochs}" if script is gpt else f"--epochs={epochs}"
    if resume:
        return [*["train"] * (script is gpt), "--resume", resume, length, *more]
    return [*SHORT[script].split(), length, *more]


def with_rate(script, rate):
    return [f"--ae-lr={rate}", f"--d-lr={rate / 2}"] if script is aae else [f"--lr={rate}"]


class Training(TemporaryFolder):
    def setUp(self):
        super().setUp()
        self.text = write_text()

    def test_tokens_are_kept_in_a_file_for_each_limit_and_tokenizer_and_used_again(self):
        letters, folder = gpt.CharTokenizer("\n abcdefg"), Path("data")
        tokenizers = letters, byte_tokenizer("a b"), byte_tokenizer(special=["c d"])
        for i, (tokenizer, limit) in enumerate(itertools.product(tokenizers, (None, 3333)), 1):
            tokens = gpt.tokenize("text.txt", limit, tokenizer, folder)
            self.assertEqual(tokens.tolist(), tokenizer.encode(self.text[:limit]))
            self.assertEqual(len(os.listdir(folder)), i)
        with patch(letters, "encode", side_effect=AssertionError):
            with contextlib.redirect_stderr(io.StringIO()) as err:
                gpt.tokenize("text.txt", None, letters, folder)
        self.assertRegex(err.getvalue(), r"^data.tokens-\w+\.bin: used again")

    def test_without_a_network_training_reads_pythons_documentation_and_says_why(self):
        for error, reason in ((gpt.urllib.error.URLError("Tunnel connection failed: 407"), "407"),
                              (TimeoutError("timed out"), "timed out")):
            with mock.patch("urllib.request.urlopen", side_effect=error):
                argv = "train", "--limit", 5000, "--max-steps", 1, "--device", "cpu"
                _, out, err = run_script(gpt, *argv)
            self.assertIn("-> runs/gpt-python-topics", out)
            self.assertRegex(err, f"warning: .*{reason}.*Python's documentation")

    def test_training_windows_cover_the_text_and_differ_between_steps_and_seeds(self):
        seen, windows = [], gpt.windows

        def note(tokens, starts, length):
            if len(tokens) == 4500:  # those to train on, not to validate
                seen.append(tuple(starts))
            return windows(tokens, starts, length)

        patch(gpt, "windows", note).start()
        for seed in (1, 1, 2):
            self.succeed(gpt, *SHORT[gpt].split(), "--max-steps", 70, "--seed", seed)
        self.assertEqual(seen[:70], seen[70:140])
        self.assertEqual(len(set(seen)), 140)
        covered = np.unique(np.ravel(seen[:70])[:, None] + np.arange(16))
        # 70 steps x 8 windows x 16 tokens are two passes; at random they would see 1 - e^-2 = 0.86.
        self.assertGreater(len(covered), 0.99 * 4500)

    def test_a_run_loads_in_transformers_and_a_tokenizer_of_transformers_loads_here(self):
        transformers = import_transformers(self)
        byte_tokenizer("a b", "Ġ ab", special=("<|endoftext|>", "<|user|>")).save(".")
        self.succeed(gpt, *short_argv(gpt, 1, "--tokenizer", ".", "--out-dir", "run"))
        ours, theirs = (GPT.from_pretrained("run").eval() for GPT in (
            gpt.GPT, transformers.GPT2LMHeadModel))
        idx = TOKENS[:, :16]
        assert_close(ours(idx)[0], theirs(idx).logits, rtol=0, atol=1e-4)
        tokenizer = transformers.GPT2Tokenizer.from_pretrained("run")
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.save_pretrained("theirs")
        text = "ab ab'll <|user|>  abc<|endoftext|>\n\n日本é"
        for folder in ("run", "theirs"):
            self.assertEqual(gpt.load_tokenizer(folder).encode(text), tokenizer.encode(text))

    def test_losses_of_ten_steps_equal_those_of_transformers_with_torchs_adamw(self):
        transformers = import_transformers(self)
        self.addCleanup(torch.set_default_dtype, torch.get_default_dtype())  # back to this
        torch.set_default_dtype(torch.float64)
        seen = []

        def note(model, batch, results):
            if isinstance(model, gpt.GPT) and model.training:
                seen.append((*batch, results[1].item()))

        hook = nn.modules.module.register_module_forward_hook(note)
        self.addCleanup(hook.remove)
        write_folder("old", gpt.CharTokenizer("\n abcdefg"))
        self.succeed(gpt, *"train --text text.txt --init old --device cpu --out-dir new".split(),
                     "--max-steps", 11, "--lr", 1e-3)
        theirs = transformers.GPT2LMHeadModel.from_pretrained("old").double()
        groups = [{"params": [p for p in theirs.parameters() if p.dim() == dim],
                   "weight_decay": decay} for dim, decay in ((2, 0.1), (1, 0.0))]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
        self.assertEqual(len(seen), 11)  # the last shows what ten steps did
        for step, (idx, targets, ours) in enumerate(seen):
            identical(targets[:, :-1], idx[:, 1:])  # the next tokens
            loss = F.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten())
            self.assertAlmostEqual(ours, loss.item(), delta=1e-8)
            for group in optimizer.param_groups:  # in 11 steps the rate only falls
                group["lr"] = 1e-3 * (1 - (step + 0.5) / 11) / (1 - 0.01)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()

    def test_fine_tuning_keeps_tokenizer_and_size_and_starts_at_the_pretrained_loss(self):
        write_folder("hub", byte_tokenizer(), vocab_size=300, eos_token_id=[9, 8], bos_token_id=7)
        model, tokenizer = gpt.GPT.from_pretrained("hub"), gpt.load_tokenizer("hub")
        ids = torch.tensor(tokenizer.encode(self.text)).split([4500, 500])[1]  # to validate
        before = model(ids[:480].view(20, 24), ids[1:481].view(20, 24))[1].item()  # whole windows
        argv = "train --text text.txt --init hub --device cpu --batch-size 3".split()
        self.succeed(gpt, *argv, "--max-steps", 1, "--lr", 0, "--out-dir", "same")
        self.assertAlmostEqual(read_rows("same")[0]["val_loss"], before, places=5)
        self.succeed(gpt, *argv, "--max-steps", 50, "--lr", 3e-3, "--out-dir", "a")
        self.assertLess(read_rows("a")[-1]["val_loss"], before - 0.1)
        self.assertEqual(gpt.load_tokenizer("a").vocab, tokenizer.vocab)
        self.assertEqual(gpt.GPT.from_pretrained("a").config, model.config)


def assert_the_same_run(first, second, error=0.0):
    """All tensors of the checkpoints, and all results but times, are the same."""
    contents = []
    for run in (first, second):
        saved = {path.name: torch.load(path) for path in sorted(Path(run).glob("*.pt"))}
        rows = [*saved["last.pt"]["rows"], *read_rows(run),
                *(json.loads(path.read_text()) for path in Path(run).glob("test.json"))]
        for row in rows:
            row.update(seconds=0, images_per_s=0, tokens_per_s=0)
        contents.append([rows, *([checkpoint.get(name) or {} for checkpoint in saved.values()]
                                 for name in ("model", "optimizers", "scaler"))])
    assert_close(*contents, rtol=error, atol=error)


def start_process(script, argv, instant=0, environment=None):
    """-> a process that runs a script and kills itself at an instant (0: never): counted are its
    backward passes, and two calls, fsync and replace, for each file that it writes. Under
    torchrun's environment it computes in float64."""
    count = itertools.count(1)

    def counted(function):
        def wrapper(*args, **kwargs):
            if next(count) == instant:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return wrapper

    def run():
        torch.Tensor.backward = counted(torch.Tensor.backward)
        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
        if environment:
            os.environ |= environment
            torch.set_default_dtype(torch.float64)
        sys.exit(run_script(script, *argv)[0])

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


class Runs(TemporaryFolder):
    def setUp(self):
        super().setUp()
        write_text()

    def test_a_run_writes_its_files_whole_and_every_epoch_has_new_random_numbers(self):
        for picture in PICTURES:
            patch(*picture).start()
        replace, replaced = os.replace, set()  # what has a temporary name at first is whole
        patch(os, "replace", lambda old, new: (replaced.add(new.name), replace(old, new))).start()
        Path("text.txt").write_text("a" * 4500 + "b" * 500)  # only dropout differs
        write_pictures("photos")
        samples = "samples_epoch_000.png samples_epoch_001.png samples_epoch_002.png"
        rebuilt = samples.replace("samples", "reconstructions")
        for script, flags, name, own, column in (
                (vae, "--z-dim 2 --dataset photos", "vae-z2-photos", "test.json best.pt bpd.png "
                 f"{samples} reconstructions.png latents.png manifold.png", "train_rec"),
                (aae, "--z-dim 2 --lam 1", "aae-z2-lam1-glyphs", f"test.json manifold.png mse.png "
                 f"codes.png adversary.png {samples} {rebuilt}", "disc_loss"),
                (aae, "--posterior universal --dataset photos", "aae-z8-lam0.995-universal-photos",
                 f"test.json codes.png mse.png adversary.png {samples} {rebuilt}", "gen_loss"),
                (gpt, "--dropout 0.5", "gpt-text", "config.json model.safetensors vocab.json "
                 "loss.png", "train_loss")):
            out = self.succeed(script, *short_argv(script, 2, *flags.split()),
                               *with_rate(script, 0))  # so only random numbers differ
            first, second = (row[column] for row in read_rows(f"runs/{name}"))
            self.assertNotEqual(first, second)
            self.assertRegex(out.splitlines()[-1], f"^{name}.* -> runs/{name}$")
            self.assertIn(f"--resume runs/{name}", out.splitlines()[2])
            files = set(os.listdir(f"runs/{name}"))
            self.assertEqual(files, set(f"args.json metrics.jsonl last.pt {own}".split()))
            self.assertLessEqual(files, replaced)
            replaced.clear()
        self.assertEqual(sorted(os.listdir()), ["data", "photos", "runs", "text.txt"])

    @needs_posix
    def test_a_run_killed_and_resumed_ends_bit_identical_to_an_unbroken_one(self):
        for script in SHORT:
            whole, killed = f"{script.__name__}-whole", f"{script.__name__}-killed"
            more = [*with_rate(script, 1e-3), *["--dropout=0.2"] * (script is gpt), "--out-dir"]
            self.succeed(script, *short_argv(script, 4, *more, whole))
            argv = short_argv(script, 4, *more, killed)
            passes = 30 if script is aae else 15  # in an epoch
            for instant, where in ((passes + 17, "the second epoch"), (2, "args.json"),
                                   (12, "a step"), (passes + 5, "the writes after an epoch"),
                                   (passes + 17, "the next epoch"), (9, "a step")):
                process = start_process(script, argv, instant)
                process.join()
                self.assertEqual(process.exitcode, -signal.SIGKILL, where)
                argv = short_argv(script, 4, resume=killed)
            with patch(gpt.CharTokenizer, "save", side_effect=AssertionError):
                self.succeed(script, *argv)  # only a new run saves its tokenizer
            assert_the_same_run(whole, killed)
        identical(*(gpt.GPT.from_pretrained(run).state_dict() for run in (whole, killed)))

    def test_losses_in_16_bits_are_near_those_in_32(self):
        for script, column, *dtypes in (
                (vae, "train_bpd", torch.bfloat16), (aae, "train_mse", torch.bfloat16),
                (gpt, "train_loss", torch.bfloat16, torch.float16)):
            losses = []
            for dtype in (torch.float32, *dtypes):
                run, device = f"{script.__name__}-{dtype}", (torch.device("cpu"), dtype)
                with patch(common, "pick_device", return_value=device):
                    self.succeed(script, *short_argv(script, 3, "--out-dir", run))
                losses.append(read_rows(run)[-1][column])
            self.assertEqual(len(set(losses)), len(losses))  # near, but not the same
            self.assertLess(max(losses) / min(losses), 1.03)
        self.assertTrue(torch.load(f"{run}/last.pt")["scaler"])  # of float16

    def test_resume_refuses_arguments_and_data_that_contradict_the_run(self):
        write_pictures("photos")
        for script, size, more in ((vae, "--z-dim", ["--dataset", "photos"]), (aae, "--z-dim", []),
                                   (gpt, "--n-layer", [])):
            run = script.__name__
            self.succeed(script, *short_argv(script, 1, *more, "--out-dir", run))
            for flag, value in (("--seed", 1), (size, 3), ("--batch-size", 10), ("--limit", 100),
                                ("--out-dir", "b")):
                self.refuse(script, *short_argv(script, 2, flag, value, resume=run), naming=flag)
        self.refuse(aae, *short_argv(aae, 2, resume="vae"), naming="vae.py")
        self.refuse(aae, *short_argv(aae, 2, resume="nowhere"), naming="nowhere/last.pt")
        os.truncate("aae/last.pt", 1000)
        self.refuse(aae, *short_argv(aae, 2, resume="aae"), naming="aae/last.pt")

        Path("text.txt").write_text("abc" * 999)
        self.refuse(gpt, *short_argv(gpt, 2, resume="gpt"), naming="text.txt has other tokens")
        self.refuse(vae, *short_argv(vae, 2, "--dataset", "glyphs", resume="vae"), naming="glyphs")
        os.rename("photos", "elsewhere")
        self.refuse(vae, *short_argv(vae, 2, resume="vae"), naming="photos")
        self.succeed(vae, *short_argv(vae, 2, "--dataset", "elsewhere", resume="vae"))
        os.rename("elsewhere/a/04.png", "elsewhere/a/44.png")
        self.refuse(vae, *short_argv(vae, 3, resume="vae"), naming="not the images")

    def test_resume_counts_from_the_checkpoints_epoch_or_step_and_not_from_its_rows(self):
        for script in SHORT:
            run = script.__name__
            self.succeed(script, *short_argv(script, 2, "--out-dir", run))
            checkpoint = torch.load(f"{run}/last.pt")
            del checkpoint["rows"][1]
            torch.save(checkpoint, f"{run}/last.pt")
            self.succeed(script, *short_argv(script, 3, resume=run))
            positions = [row.get("step", 15 * row.get("epoch", 0)) for row in read_rows(run)]
            self.assertEqual(positions, [15, 45])

    def test_a_wrong_value_of_a_flag_gives_an_error_of_one_line(self):
        for script, argv, *values in (
                (vae, SHORT[vae], "--epochs 0", "--image-size 4", "--dataset imagenet",
                 "--dataset .", "--dataset glyphs --image-size 32", "--z-dim two", "--lr nan",
                 "--out-dir text.txt/run"),
                (aae, SHORT[aae], "--lam 1.01", "--posterior normal", "--d-lr -1"),
                (gpt, SHORT[gpt], "--dropout 2", "--n-embd 30", "--grad-accum 3", "--text nowhere",
                 "--tokenizer nowhere", "--n-layer 3 --init gpt2", "--tokenizer char --init gpt2"),
                (gpt, "generate", "--top-p 1.1", "--max-new 3", "--model nowhere")):
            for value in values:
                *_, flag, word = value.split()
                self.refuse(script, *argv.split(), *value.split(),
                            naming=word if word in ("nowhere", "text.txt/run") else flag)

    def test_a_run_whose_losses_are_no_longer_finite_stops_before_it_saves_its_weights(self):
        for script, losses in ((vae, (1., math.inf)), (aae, (math.inf, 1.)), (gpt, math.inf)):
            argv = short_argv(script, 1, "--out-dir", "a")
            ends = [run_script(script, *argv, *with_rate(script, 1e9))]
            with patch(script, "evaluate", return_value=losses):  # of finite weights
                ends.append(run_script(script, *argv))
            for status, _, err in ends:
                self.assertEqual((status, "lower learning rate" in err), (2, True))
        files = {path.name for path in Path().glob("a*/*")}
        self.assertEqual(files, {"args.json", "vocab.json"})

    def test_vae_tests_and_gpt_saves_the_model_of_the_lowest_validation_loss(self):
        with patch(vae, "evaluate", side_effect=[[3, 3], [1, 1], [2, 2]]), patch(
                vae, "test_results", return_value={}) as test:  # rec, kl of three epochs
            self.succeed(vae, *short_argv(vae, 3, "--out-dir", "vae"))
        (tested, _), best = test.call_args.args, torch.load("vae/best.pt")
        self.assertEqual(best["epoch"], 2)
        identical(tested.state_dict(), best["model"])
        for losses, last_is_best in ([1.0, 2.0], False), ([2.0, 1.0], True):
            with patch(gpt, "evaluate", side_effect=losses):
                self.succeed(gpt, *short_argv(gpt, 2, "--out-dir", f"{losses}"))
            saved, last = gpt.GPT.from_pretrained(f"{losses}"), torch.load(f"{losses}/last.pt")
            self.assertEqual(torch.equal(saved.wte.weight, last["model"]["wte.weight"]),
                             last_is_best)

    def test_codes_come_near_the_prior_for_lambda_below_1_but_not_for_lambda_1(self):
        for lam, low, high in ((0.995, 0, 3), (1, 4, 1000)):
            self.succeed(aae, *short_argv(aae, 4, "--limit", 2000, "--ae-lr", 1e-2, "--d-lr", 1e-3,
                                          "--num-filters", 8, "--lam", lam, "--out-dir", f"{lam}"))
            row = read_rows(f"{lam}")[-1]
            self.assertLess(row["val_mse"], 0.18)  # 0.22: the mean of all images
            self.assertTrue(low < row["val_distance"] < high, row)

    @needs_posix
    def test_training_on_two_processes_equals_one_and_one_process_can_resume_it(self):
        def exit_codes(*argv, processes, instant=0):  # of gpt.py's processes
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            started = [start_process(gpt, argv, instant, {
                "RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{processes}",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}) for rank in range(processes)]
            for process in started:
                process.join()
            return [process.exitcode for process in started]

        argv = short_argv(gpt, 3, "--batch-size", 8, "--out-dir")
        for run, n in (("one", 1), ("two", 2)):  # each of the two takes its share in two parts
            self.assertEqual(exit_codes(*argv, run, "--grad-accum", n, processes=n), [0] * n)
        killed = exit_codes(*argv, "killed", processes=2, instant=40)  # after the first evaluation
        self.assertIn(-signal.SIGKILL, killed)
        self.assertEqual(exit_codes("train", "--resume", "killed", processes=1), [0])
        assert_the_same_run("one", "two", error=1e-9)
        assert_the_same_run("one", "killed", error=1e-9)


class CopiedCode(TemporaryFolder):
    def test_each_model_can_be_copied_without_common_and_changed_to_have_no_biases(self):
        without_common = "\nimport common\n", "\n"
        without_bias = "padding=1), nn.", "padding=1, bias=False), nn."
        x = render_glyphs()[0][:2]
        pasted = changed_copy(vae, without_common, without_bias)
        model = pasted.VAE(2, 4)
        sum(model(x >> 4)).backward()
        self.assertEqual(model.sample(2).shape, x.shape)
        self.assertEqual(pasted.log_likelihood(model, x >> 4, 3).shape, (2,))

        pasted = changed_copy(aae, without_common, without_bias)
        model = pasted.AdversarialAE(2, "universal")
        recon, z = model(x / 255)
        model.autoencoder_loss(x / 255, recon, z, 0.995)[0].backward()
        model.discriminator_loss(z.detach())[0].backward()
        self.assertEqual(pasted.sliced_wasserstein(z, z, 10), 0)

        pasted, own = changed_copy(gpt, without_common), byte_tokenizer("a b")
        model = pasted.GPT(pasted.GPTConfig(61, 24, 2, 2, 16, fused=False))
        model(TOKENS, TOKENS)[1].backward()
        self.assertEqual(model.eval().generate(TOKENS, 3, top_p=0.9).shape, (5, 27))
        tokenizer = pasted.BPETokenizer(own.vocab, own.merges, own.special)
        self.assertEqual(tokenizer.encode("ab é"), own.encode("ab é"))
        self.assertEqual(pasted.CharTokenizer("abc").encode("cab"), [2, 0, 1])

    def test_a_parameter_that_you_add_is_in_one_optimizer_and_evaluation_is_without_dropout(self):
        class Changed:  # goes before the script's class
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.own = nn.ParameterList(map(torch.ones, ((), (2, 2), (1, 2, 2))))
                self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
                self.unused = nn.Parameter(torch.ones(2, 2))

            def forward(self, *inputs):
                self.modes.add((self.training, torch.is_grad_enabled()))
                factor = math.prod(weight.mean() for weight in [*self.own, self.frozen])
                return [factor * result for result in super().forward(*inputs)]

        write_text()
        for script, name, optimizer in (
                (vae, "VAE", "muon"), (aae, "AdversarialAE", "muon"), (gpt, "GPT", "muon"),
                (vae, "VAE", "adam"), (aae, "AdversarialAE", "adam"), (gpt, "GPT", "adamw")):
            changed = type(name, (Changed, getattr(script, name)), {"modes": set()})
            argv = short_argv(script, 1, "--optimizer", optimizer, "--out-dir")
            still, moved = f"{name}-{optimizer}-still", f"{name}-{optimizer}-moved"
            with patch(script, name, changed):
                self.succeed(script, *argv, still, *with_rate(script, 0))
                self.succeed(script, *argv, moved)
            still, moved = torch.load(f"{still}/last.pt"), torch.load(f"{moved}/last.pt")
            for weight, before in still["model"].items():
                self.assertEqual(bool((moved["model"][weight] != before).any()),
                                 weight not in ("frozen", "unused"), weight)
            groups = [group for o in moved["optimizers"] for group in o["param_groups"]]
            self.assertEqual(sum(len(group["params"]) for group in groups), len(moved["model"]))
            self.assertEqual(changed.modes, {(True, True), (False, False)})

    def test_only_the_discriminators_step_trains_discriminators_also_renamed_or_added_ones(self):
        copy = changed_copy(
            aae, ("self.discriminator = Discriminator(z_dim)",
                  "self.critic, self.second = Discriminator(z_dim), Discriminator(z_dim)"),
            ("[*model.discriminator.parameters()]",
             "[*model.critic.parameters(), *model.second.parameters()]"),
            ("self.discriminator(z)", "(self.critic(z) + self.second(z))"),
            ("self.discriminator(both)", "(self.critic(both) + self.second(both))"))
        first = {}
        for run, rates, expected in (
                ("still", "--ae-lr=0 --d-lr=0", set()),
                ("phase1", "--d-lr=0", {"encoder", "decoder"}),
                ("phase2", "--ae-lr=0", {"critic", "second"})):
            self.succeed(copy, *short_argv(aae, 1, *rates.split(), "--out-dir", run))
            weights = torch.load(f"{run}/last.pt")["model"]
            first = first or weights  # those of "still", which are the initial ones
            moved = {name.split(".")[0] for name in first if (weights[name] != first[name]).any()}
            self.assertEqual(moved, expected)


class Readme(TemporaryFolder):
    def test_every_flag_in_a_command_of_the_readme_is_in_the_help_of_that_command(self):
        commands = re.findall(r"(vae|aae|gpt)\.py( train| generate)?((?:\\\n|[^\n`|&])*)",
                              (HERE / "README.md").read_text(encoding="utf-8"))
        self.assertGreater(len(commands), 20)
        for name, command, rest in commands:
            script = {"vae": vae, "aae": aae, "gpt": gpt}[name]
            _, text, _ = run_script(script, *command.split(), "--help")
            flags = set(re.findall(r"--[a-z-]+", rest))
            self.assertLessEqual(flags, set(re.findall(r"--[a-z-]+", text)))

    def test_the_python_examples_of_the_readme_run(self):
        text = (HERE / "README.md").read_text(encoding="utf-8")
        notebook, class_conditional = re.findall(r"```python\n(.*?)```", text, re.S)
        # These stand in for what takes minutes or a network.
        self.succeed(vae, *short_argv(vae, 1, "--z-dim", 2, "--out-dir", "runs/vae-z2"))
        write_folder("gpt2", byte_tokenizer(special=["<|endoftext|>"]), vocab_size=257)
        patch(common, "read_dataset", lambda *_: ("glyphs", *render_glyphs())).start()
        names = {}
        exec(notebook + class_conditional.replace("60_000", "64"), names)
        self.assertEqual((len(names["idx"]), names["digits"].shape), (1, (10, 1, 28, 28)))


# -- The benchmark ----------------------------------------------------------------------------


def in_turn(title, number, ours, theirs):
    """Call two functions in turn, which return the seconds for `number` images or tokens."""
    seconds = np.array([(ours(), theirs()) for _ in range(5)])
    (a, b), ratios = np.median(number / seconds, axis=0), seconds[:, 1] / seconds[:, 0]
    print(f"{title}: {a:,.1f} beside {b:,.1f}; ratio {np.median(ratios):.2f} "
          f"({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def training_in_turn(title, number, argv, batches, losses_of):
    """A script's own training beside that of most tutorials. argv: of the script; losses_of(batch)
    yields each loss of the other model and its optimizer."""
    def ours():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, *map(str, argv), "--device", "cpu", "--out-dir",
                            f"{folder}/run"], cwd=HERE, check=True, stdout=subprocess.DEVNULL)
            return read_rows(f"{folder}/run")[-1]["seconds"]

    def theirs():
        for batch in batches:
            for loss, optimizer in losses_of(batch):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            loss.item()

    in_turn(f"training, {title}", number, ours, lambda: timeit.timeit(theirs, number=1))


def bench():
    import transformers
    from torchvision import datasets, transforms

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of runs in turn, "
          "and the ratio with its range", flush=True)
    mnist = datasets.MNIST(DATA_DIR, train=True, transform=transforms.ToTensor())
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(mnist, range(6400)), 64,
                                         shuffle=True)
    model, other = vae.VAE(), aae.AdversarialAE()
    autoencoder = nn.ModuleList([other.encoder, other.decoder])
    adam, ae_adam, d_adam = (torch.optim.Adam(network.parameters(), lr=1e-3) for network in (
        model, autoencoder, other.discriminator))

    def vae_losses(batch):  # ToTensor divides by 255
        yield sum(model((batch[0] * 16).clamp(max=15).long())), adam

    def aae_losses(batch):
        x = 2 * batch[0] - 1
        recon, z = other(x)
        yield other.autoencoder_loss(x, recon, z, lam=0.995)[0], ae_adam
        yield other.discriminator_loss(z.detach())[0], d_adam

    for script, losses_of in (("vae.py", vae_losses), ("aae.py", aae_losses)):
        argv = script, "--data-dir", DATA_DIR, "--limit", 6400, "--epochs", 1
        training_in_turn(f"images/s: {script} beside a DataLoader and Adam", 6400, argv, loader,
                         losses_of)

    transformers.logging.set_verbosity_error()
    text = DATA_DIR / "tinyshakespeare.txt"
    tokens = text.read_text(encoding="utf-8")[:100_000]
    tokens = torch.tensor(gpt.CharTokenizer("".join(sorted(set(tokens)))).encode(tokens))
    small = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(tokens.unique()), n_positions=64, n_layer=4, n_head=4, n_embd=128,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None))
    adamw = torch.optim.AdamW(small.parameters(), lr=3e-3)

    def gpt_losses(starts):  # [8, 1]
        x = tokens[starts + torch.arange(64)]
        yield small(input_ids=x, labels=x).loss, adamw

    argv = ("gpt.py", "train", "--text", text, "--limit", 100_000, "--max-steps", 100,
            "--optimizer", "adamw")
    training_in_turn("tokens/s: gpt.py (AdamW) beside transformers", 100 * 8 * 64, argv,
                     torch.randint(len(tokens) - 64, (100, 8, 1)), gpt_losses)
    ours = gpt.GPT(gpt.GPTConfig(50257, 1024, 12, 12, 768)).eval()
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    idx = torch.randint(50257, (1, 32))
    in_turn("generation with GPT-2's 124M, tokens/s: gpt.py beside transformers", 200,
            lambda: timeit.timeit(lambda: ours.generate(idx, 200, do_sample=False), number=1),
            lambda: timeit.timeit(lambda: theirs.generate(
                idx, attention_mask=torch.ones_like(idx), min_new_tokens=200, max_new_tokens=200,
                do_sample=False, pad_token_id=0), number=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bench"]:
        sys.exit(bench())
    result = unittest.main(exit=False, verbosity=2).result
    failed, skipped = len(result.failures) + len(result.errors), len(result.skipped)
    for test, reason in result.skipped:
        print(f"skipped {test}: {reason}")
    print(f"{result.testsRun - failed - skipped} passed, {failed} failed, {skipped} skipped")
    sys.exit(bool(failed))
