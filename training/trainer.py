"""The training loop, on Lightning Fabric: CPU, one GPU, or several processes started by torchrun.

Every random choice depends only on the seed and the sample index, every learning rate only on the step. Runs are
therefore reproducible, and a state file with the weights, the optimizers and the step is enough to resume exactly.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from ..plugins.shared.errors import EnvironmentMismatch, MisfError
from . import losses
from .dataset import TrainingSamples
from .discriminator import PatchDiscriminator
from .efficientnet import FeatureDistance
from .model.checkpoint import save_checkpoint, take_weights
from .model.network import InpaintingNetwork, composite, initialize
from .optimizers import make_optimizers
from .recipe import Recipe
from .resident import ResidentSamples
from .run_files import RunFolder, RunLog
from .vgg19 import VGG19_SOURCE, Vgg19

log = logging.getLogger(__name__)

Batch = tuple[Tensor, ...]
"""Image and mask; with damage masks, also what is damaged: see `TrainingSamples.sample`."""
Numbers = dict[str, Tensor]


class Compared(NamedTuple):
    """What the losses compare: float32 N,3,H,W and masks N,1,H,W."""

    prediction: Tensor
    image: Tensor
    mask: Tensor
    """What the network had to fill."""
    hole: Tensor
    """The part of `mask` whose truth is known: all of it but for damage."""
    damaged: Tensor | None

    @property
    def composite(self) -> Tensor:
        """The finished picture N,3,H,W."""
        return composite(self.image, self.prediction, self.hole)


def make_fabric(device: str = "auto", precision: str = "32-true") -> Fabric:
    """Return a launched Fabric for this process, which runs alone or is one of several started by torchrun.

    Args:
        device: auto (a GPU if there is one), cpu or cuda.
        precision: 32-true or bf16-mixed.

    Raises:
        EnvironmentMismatch: `device` is cuda and PyTorch finds no usable GPU.

    """
    if device == "cuda" and not torch.cuda.is_available():
        hint = "leave the option out, or install a CUDA build of PyTorch"
        raise EnvironmentMismatch(f"--device cuda: PyTorch finds no NVIDIA GPU that it can use; {hint}")
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32 is precise enough for Muon's products
        torch.backends.cudnn.benchmark = True  # all batches have the same size
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    fabric = Fabric(
        accelerator=device,
        devices=local,
        num_nodes=world // local,
        precision=precision,  # type: ignore[arg-type]
        strategy=DDPStrategy() if world > 1 else "auto",
    )
    fabric.launch()
    on_cpu = fabric.device.type == "cpu"
    if precision == "bf16-mixed" and on_cpu and fabric.is_global_zero and not computes_bf16():
        log.warning("this processor has no bfloat16 instructions: steps take much longer than with --precision fp32")
    return fabric


def computes_bf16() -> bool:
    """Return whether this processor has bfloat16 instructions; True if PyTorch cannot tell.

    Without them a step of the published network took twice as long as in float32 with AVX-512, and fifteen times as
    long with AVX2 (measured with ONEDNN_MAX_CPU_ISA on a processor that has them).
    """
    has: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older versions of PyTorch
    return not has or any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16"))


class StepSampler(Sampler[int]):
    """The sample indices of one process, from step `start` to the end: a slice of each step's batch."""

    def __init__(self, config: Recipe, start: int, rank: int, world: int) -> None:
        if config.batch % (config.accumulate * world):
            raise ValueError(
                "batch must be a multiple of accumulate x processes, "
                f"got {config.batch}, {config.accumulate} and {world}"
            )
        self.config, self.start, self.rank, self.world = config, start, rank, world
        self.part = config.batch // (config.accumulate * world)

    def __len__(self) -> int:
        return (self.config.steps - self.start) * self.config.accumulate * self.part

    def __iter__(self) -> Iterator[int]:
        for step in range(self.start, self.config.steps):
            for turn in range(self.config.accumulate):
                first = step * self.config.batch + (turn * self.world + self.rank) * self.part
                yield from range(first, first + self.part)


class Trainer:
    """A run: both networks, their optimizers, the averaged weights, and the step it has reached.

    Args:
        config: the recipe.
        fabric: from `make_fabric`.
        vgg: frozen VGG-19; required if the recipe compares its features.
        distances: feature distances, of which each step uses the next one; required if the recipe uses them.
        weights: the generator's initial state dict, perhaps of another network (`take_weights`); random by default.
        teacher: a trained network of any config, frozen, in eval mode (`load_model`); required if the recipe has the
            loss of that name.

    Raises:
        MisfError: the recipe needs `vgg`, `distances` or `teacher`, or its schedule does not work with several
            processes.

    """

    def __init__(
        self,
        config: Recipe,
        fabric: Fabric,
        *,
        vgg: Vgg19 | None = None,
        distances: Sequence[FeatureDistance] = (),
        weights: dict[str, Tensor] | None = None,
        teacher: InpaintingNetwork | None = None,
    ) -> None:
        if config.needs_vgg and vgg is None:
            raise MisfError(f"the recipe compares VGG-19 features: give {VGG19_SOURCE} with --vgg19")
        if config.seconds and fabric.world_size > 1:
            raise MisfError("a schedule by the clock (seconds) works with one process only: give --steps instead")
        if config.distance and not distances:
            raise MisfError("the recipe uses a feature distance: give --perceptual-backbone")
        if config.teacher and teacher is None:
            raise MisfError("the recipe learns from the fills of a trained network: give --teacher")
        self.config, self.fabric, self.step = config, fabric, 0
        self.elapsed_s = 0.0
        # On CPUs channels-last makes the wide convolutions' backward slower (AVX2) or gains nothing (AVX-512).
        on_gpu = fabric.device.type == "cuda"
        self.layout = torch.channels_last if on_gpu else torch.contiguous_format
        torch.manual_seed(config.seed)
        network = InpaintingNetwork(config.network)
        initialize(network)
        if weights is not None:
            take_weights(network, weights)
        network = network.to(memory_format=self.layout)  # type: ignore[call-overload]
        self.network = network
        self.average = fabric.to_device(copy.deepcopy(network).eval().requires_grad_(False))
        optimizers = make_optimizers(network, config)
        self.generator, *wrapped = fabric.setup(network, *(optimizer for optimizer, _ in optimizers))
        self.optimizers = [(optimizer, share) for optimizer, (_, share) in zip(wrapped, optimizers, strict=True)]
        self.vgg = None if vgg is None else fabric.to_device(vgg.to(memory_format=self.layout))  # type: ignore[call-overload]
        self.distances = [fabric.to_device(each.to(memory_format=self.layout)) for each in distances]  # type: ignore[call-overload]
        self.teacher: Any = None
        if teacher is not None:
            self.teacher = fabric.to_device(teacher.to(memory_format=self.layout))  # type: ignore[call-overload]
        self.discriminator: Any = None
        self.discriminator_optimizer: Any = None
        if config.adversarial:
            judge = PatchDiscriminator(config.discriminator_width).to(memory_format=self.layout)  # type: ignore[call-overload]
            rate = config.learning_rate * config.discriminator_rate
            judging = torch.optim.Adam(judge.parameters(), rate, betas=config.betas, fused=True)
            self.discriminator, self.discriminator_optimizer = fabric.setup(judge, judging)

    def close(self) -> None:
        """Drop the networks and shut the process group down on all ranks together; the trainer is unusable afterwards.

        A rank that exits early can make its peers abort. The networks must go first: they keep DDP's reducer alive,
        which owns the group's threads and, if it is destroyed at process exit, joins them while holding the GIL.
        """
        if self.fabric.world_size == 1 or not torch.distributed.is_initialized():
            return
        del self.generator, self.network, self.average, self.optimizers, self.vgg, self.distances, self.teacher
        del self.discriminator, self.discriminator_optimizer
        gc.collect()
        self.fabric.barrier()
        torch.distributed.destroy_process_group()

    def batches(self, samples: TrainingSamples | ResidentSamples, workers: int = 0) -> Iterator[Batch]:
        """Yield this process's part of every batch from the current step on, one for each accumulated pass.

        Contents, shapes and ranges are those of `TrainingSamples.sample`, with N in front, on the trainer's device.
        """
        sampler = StepSampler(self.config, self.step, self.fabric.global_rank, self.fabric.world_size)
        if isinstance(samples, ResidentSamples):
            passes, world = self.step * self.config.accumulate, self.fabric.world_size
            for image, *masks in samples.batches(passes * world + self.fabric.global_rank, sampler.part, world):
                yield image.contiguous(memory_format=self.layout), *masks
            return
        loader = DataLoader(
            samples,
            batch_size=sampler.part,
            sampler=sampler,
            num_workers=workers,
            pin_memory=self.fabric.device.type == "cuda",
            generator=torch.Generator(),  # the loader must not draw from the run's generator
        )
        for image, *masks in loader:
            image = image.to(self.fabric.device, memory_format=self.layout, non_blocking=True)
            yield image, *(mask.to(self.fabric.device, non_blocking=True) for mask in masks)

    def train_step(self, batches: Iterator[Batch]) -> Numbers:
        """Train both networks for one step on the next `accumulate` batches; return the losses by name.

        The losses are scalar tensors on the training device, so that nothing waits for the GPU yet.
        """
        config = self.config
        for optimizer, share in self._every_optimizer():
            optimizer.param_groups[0]["lr"] = config.rate(self.step, self.elapsed_s) * share
            optimizer.zero_grad(set_to_none=True)
        totals: Numbers = {}
        for turn in range(config.accumulate):
            for name, value in self._pass(*next(batches), last=turn == config.accumulate - 1).items():
                value = value.detach() / config.accumulate
                totals[name] = totals[name] + value if name in totals else value
        if config.clip:
            totals["gradient"] = torch.nn.utils.clip_grad_norm_(self.generator.parameters(), config.clip)
        for optimizer, _ in self._every_optimizer():
            optimizer.step()
        self.step += 1
        self._update_average()
        return totals

    @property
    def finished(self) -> bool:
        """Whether the recipe's last step is done or its time is up."""
        return self.config.progress(self.step, self.elapsed_s) >= 1

    @property
    def _judging(self) -> bool:
        """Whether the discriminator is in use at the current step."""
        begun = self.config.progress(self.step, self.elapsed_s) >= self.config.adversarial_from
        return self.discriminator is not None and begun

    def _every_optimizer(self) -> Iterator[tuple[Any, float]]:
        """Yield each optimizer with its share of the learning rate."""
        yield from self.optimizers
        if self.discriminator is not None:
            yield self.discriminator_optimizer, self.config.discriminator_rate

    def _pass(self, image: Tensor, mask: Tensor, damaged: Tensor | None = None, *, last: bool) -> Numbers:
        """Accumulate one batch's gradients in both networks; the generator runs once, the discriminator twice."""
        share = 1 / self.config.accumulate
        with self._no_sync(self.generator, not last):
            prediction = self.generator(image, mask).float()
            compared = Compared(prediction, image, mask, mask, None)
            if damaged is not None:
                seen, truth, hole = losses.without_damage(prediction, image, mask, damaged)
                compared = Compared(seen, truth, mask, hole, damaged)
            found: Numbers = {}
            real_features = None
            if self._judging:
                found["discriminator"], real_features = self._judge(compared, share, last)
            terms = self._generator_terms(compared, real_features)
            if self.teacher is not None:
                terms["teacher"] = self._teacher_loss(prediction, image, mask)
            weights = self.config.weights
            total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
            self.fabric.backward(total * share)
        return {**found, **terms, "total": total}

    def _judge(self, compared: Compared, share: float, last: bool) -> tuple[Tensor, list[Tensor]]:
        """Accumulate the discriminator's gradients, real and fake in one batch; return its loss and real features."""
        with self._no_sync(self.discriminator, not last):
            scores, features = self.discriminator(torch.cat([compared.image, self._judged(compared).detach()]))
            of_image, of_fake = scores.chunk(2)
            kind = self.config.adversarial_kind
            of_real, of_false = self._patches(of_fake, compared)
            loss = losses.adversarial_loss(of_image, True, kind, where=of_real)
            loss = loss + losses.adversarial_loss(of_fake, False, kind, where=of_false)
            self.fabric.backward(loss / 2 * share)
        return loss / 2, [layer.chunk(2)[0].detach() for layer in features]

    def _judged(self, compared: Compared) -> Tensor:
        """Return the discriminator's input: the composite or, without `hole_patches`, the whole prediction."""
        return compared.composite if self.config.hole_patches else compared.prediction

    def _patches(self, scores: Tensor, compared: Compared) -> tuple[Tensor | None, Tensor | None]:
        """Return the weights (0 or 1) of a true picture's scores and of a prediction's; None where all of them count.

        Patches near damage count in neither.
        """
        of_real = of_false = None
        size: tuple[int, int] = scores.shape[2:]  # type: ignore[assignment]
        if compared.damaged is not None:
            of_real = of_false = 1 - losses.touched_patches(compared.damaged, size)
        if self.config.hole_patches:
            touched = losses.touched_patches(compared.hole, size)
            of_false = touched if of_real is None else touched * of_real
        return of_real, of_false

    def _generator_terms(self, compared: Compared, real_features: list[Tensor] | None) -> Numbers:
        """Return the generator's losses by name, unweighted, in float32; only networks run in lower precision."""
        config, terms = self.config, {}
        prediction, image, mask, hole, _ = compared
        if config.l1:
            # By all of `mask`: `hole` may be nearly empty, and its sample's known pixels would outweigh all others.
            terms["l1"] = losses.l1_over_mask(prediction, image, mask)
        if config.hole:
            terms["hole"] = self._hole_loss(prediction, image, hole)
        if config.psnr:
            terms["psnr"] = losses.psnr_loss(prediction, image, hole)
        if config.ssim:
            terms["ssim"] = losses.ssim_loss(prediction, image, hole)
        if config.known:
            terms["known"] = losses.known_loss(prediction, image, mask)
        if real_features is not None:
            terms |= self._passing_for_real(compared, real_features)
        if self.distances:
            terms["distance"] = losses.feature_distance_loss(self._distance(image, compared.composite))
        if config.grid:
            terms["grid"] = losses.grid_loss(compared.composite, hole)
        if self.vgg is not None:
            with self.fabric.autocast():
                with torch.no_grad():
                    of_image = self.vgg(image)
                of_prediction = self.vgg(prediction)
            terms["perceptual"] = losses.perceptual_loss(of_prediction, of_image)
            terms["style"] = losses.style_loss(of_prediction, of_image)
        return terms

    def _hole_loss(self, prediction: Tensor, target: Tensor, hole: Tensor) -> Tensor:
        config = self.config
        return losses.hole_loss(prediction, target, hole, squared=config.hole_squared, coarse=config.hole_coarse)

    def _teacher_loss(self, prediction: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        """Return the loss from the teacher's fill of all that the network had to fill.

        What is damaged counts too: the teacher does not see it either.
        """
        assert self.teacher is not None
        with torch.no_grad(), self.fabric.autocast():
            target = self.teacher(image, mask)
        return self._hole_loss(prediction, target.float(), mask)

    def _distance(self, image: Tensor, result: Tensor) -> Tensor:
        """Return the feature distance of each pair, N, by the next of the networks.

        A few rows and columns are cut off, more from step to step: otherwise the places where the strided layers look
        would always coincide with the same places of the generator's layers, which can learn a grid from that.
        """
        top, left = self.step % 16, self.step // 16 % 16
        with self.fabric.autocast():
            found: Tensor = self.distances[self.step % len(self.distances)](
                image[:, :, top:, left:], result[:, :, top:, left:]
            )
        return found

    def _passing_for_real(self, compared: Compared, real_features: list[Tensor]) -> Numbers:
        """Return the generator's losses from the discriminator; gradients reach the prediction only.

        This calls the bare module, because DDP's wrapper would wait for gradients, in eval mode, in which spectral norm
        does not update its vectors.
        """
        judge = self.discriminator.module
        judge.eval().requires_grad_(False)
        with self.fabric.autocast():
            scores, features = judge(self._judged(compared))
        judge.train().requires_grad_(True)
        kind, (_, where) = self.config.adversarial_kind, self._patches(scores, compared)
        terms = {"adversarial": losses.adversarial_loss(scores, True, kind, for_generator=True, where=where)}
        if self.config.feature_matching:
            terms["feature_matching"] = losses.feature_matching_loss(features, real_features)
        return terms

    def _no_sync(self, module: Any, enabled: bool) -> Any:
        """Return a context that, if `enabled`, skips the gradient all-reduce, which only the last pass needs."""
        if self.fabric.world_size == 1:
            return contextlib.nullcontext()
        return self.fabric.no_backward_sync(module, enabled=enabled)

    @torch.no_grad()
    def _update_average(self) -> None:
        # The decay is ramped up; otherwise the random initial weights would linger for thousands of steps.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        pairs = list(zip(self.average.parameters(), self.network.parameters(), strict=True))
        torch._foreach_lerp_([mean for mean, _ in pairs], [now for _, now in pairs], 1 - decay)

    def state(self) -> dict[str, Any]:
        """Return everything that another process needs to resume exactly here."""
        state = {
            "config": self.config.to_json(),
            "step": self.step,
            # Used only by schedules by the clock; everything else in a state is a function of the step.
            "elapsed_s": self.elapsed_s if self.config.seconds else 0.0,
            "generator": self.generator.module.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
            "random": torch.get_rng_state(),
        }
        if self.discriminator is not None:
            state["discriminator"] = self.discriminator.module.state_dict()
            state["discriminator_optimizer"] = self.discriminator_optimizer.state_dict()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Resume from a dict that `state` returned; ValueError if it belongs to a run with another recipe."""
        if Recipe.from_json(state["config"]) != self.config:
            raise ValueError("the state belongs to a run with another recipe")
        self.step, self.elapsed_s = state["step"], state.get("elapsed_s", 0.0)
        self.generator.module.load_state_dict(state["generator"])
        self.average.load_state_dict(state["average"])
        for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.discriminator is not None:
            self.discriminator.module.load_state_dict(state["discriminator"])
            self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
        torch.set_rng_state(state["random"])

    def save(self, folder: RunFolder) -> None:
        """Write the averaged weights and then the state, on rank 0 only.

        A run that is killed between the two resumes from the previous state and writes the weights again.
        """
        if self.fabric.is_global_zero:
            self.save_weights(folder.weights)
            folder.write_state(self.state())

    def save_weights(self, path: os.PathLike[str]) -> None:
        """Write the averaged weights as a checkpoint that misf-export and misf-eval read."""
        save_checkpoint(
            path, self.config.network, self.average.state_dict(), self.step, notes={"recipe": self.config.to_json()}
        )

    @torch.no_grad()
    def filled(self, image: Tensor, mask: Tensor) -> Tensor:
        """Return the averaged network's composites, float32 N,3,H,W in [0,1]; arguments as for `composite`."""
        return composite(image, self.average(image, mask).float(), mask)

    def validate(self, cases: list[Batch]) -> float:
        """Return the mean PSNR in dB of the finished pictures; each case is (image 1,3,H,W, mask 1,1,H,W)."""
        values = []
        for image, mask in cases:
            error = self.filled(image, mask) - image
            values.append(-10 * math.log10(max(float(error.square().mean()), 1e-10)))
        return sum(values) / len(values)


def train(
    trainer: Trainer,
    samples: TrainingSamples | ResidentSamples,
    folder: RunFolder,
    *,
    workers: int = 0,
    log_every: int = 50,
    save_every: int = 500,
    picture_every: int = 1000,
    stop_at: float = math.inf,
    cases: list[Batch] | None = None,
    progress: Callable[[int, str], None] = lambda _step, _text: None,
) -> None:
    """Train from the trainer's current step to the end of the recipe; `run_files` describes the files in `folder`.

    Args:
        trainer: new, or with a state loaded.
        samples: the training data.
        folder: written by rank 0 only.
        workers: number of processes that load samples.
        log_every, save_every, picture_every: intervals in steps.
        stop_at: `time.monotonic` time at which to save the state and return, if the run has not ended before.
        cases: validation pictures (image 1,3,H,W, mask 1,1,H,W), used whenever the state is saved.
        progress: called after every step with the step's number and a short text.

    Raises:
        MisfError: a loss or gradient is NaN or infinite (the state on disk is older and intact), or `stop_at` is given
            with several processes.

    """
    config, first = trainer.config, trainer.fabric.is_global_zero
    if stop_at < math.inf and trainer.fabric.world_size > 1:
        raise MisfError("--stop-after works with one process only: several would not stop at the same step")
    shown = [tensor.to(trainer.fabric.device) for tensor in _stacked(samples, min(4, config.batch))]
    book = RunLog(folder, trainer.step) if first else None
    best = _best_so_far(folder) if first else math.inf
    batches, started, text = trainer.batches(samples, workers), time.perf_counter(), ""
    since = trainer.step
    clock = time.monotonic()
    last = trainer.finished
    while not last:
        numbers = trainer.train_step(batches)
        step, now = trainer.step, time.monotonic()
        trainer.elapsed_s, clock = trainer.elapsed_s + now - clock, now
        last = trainer.finished or now >= stop_at
        saving = step % save_every == 0 or last
        if saving or step % log_every == 0:
            values = _read(trainer.fabric, numbers)
            for name, title in (("total", "loss"), ("gradient", "gradient norm")):
                if not math.isfinite(values.get(name, 0.0)):
                    hint = f"lower the learning rate; {folder.path} holds the run as last saved"
                    raise MisfError(f"the {title} is {values[name]} at step {step}: {hint}")
            now = time.perf_counter()
            images_per_s = (step - since) * config.batch / (now - started)
            started, since = now, step
            text = f"loss {values['total']:.4g}, {images_per_s:.1f} images/s"
            if book is not None:
                rate = config.rate(step - 1, trainer.elapsed_s)
                book.numbers(step, {**values, "learning_rate": rate, "images_per_s": round(images_per_s, 2)})
                log.debug("step %d: %s", step, text)
        if saving:  # the state comes last: a run killed before that repeats all of this when it resumes
            if cases and book is not None:
                psnr_db = trainer.validate(cases)
                if psnr_db > best:
                    best = psnr_db
                    trainer.save_weights(folder.best)
                book.numbers(step, {"val_psnr_db": psnr_db})
            trainer.save(folder)
        if book is not None and (step % picture_every == 0 or last):
            image, mask = shown[:2]
            book.pictures(step, [torch.where(mask > 0.5, 1.0, image), trainer.filled(image, mask), image])
        progress(step, text)
    if book is not None:
        book.close()
    trainer.fabric.barrier()


def _stacked(samples: TrainingSamples | ResidentSamples, count: int) -> Batch:
    if isinstance(samples, ResidentSamples):
        return samples.batch(0, count)
    return tuple(map(torch.stack, zip(*(samples.sample(index) for index in range(count)), strict=True)))


def _read(fabric: Fabric, numbers: Numbers) -> dict[str, float]:
    """Return the numbers as floats, averaged over the processes."""
    stacked = torch.stack([value.float().reshape(()) for value in numbers.values()])
    reduced = fabric.all_reduce(stacked, reduce_op="mean")
    assert isinstance(reduced, Tensor)
    return dict(zip(numbers, reduced.tolist(), strict=True))


def _best_so_far(folder: RunFolder) -> float:
    """Return the best validation PSNR in the log."""
    import json

    best = -math.inf
    if folder.log.exists() and folder.best.exists():
        for line in folder.log.read_text(encoding="utf-8").splitlines():
            best = max(best, json.loads(line).get("val_psnr_db", best))
    return best
