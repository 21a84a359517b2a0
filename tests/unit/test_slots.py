"""Per-image slots: the bytes of ``Generator`` in any company, and one image's fate is no other's."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from ldm_ray.diffusion.samplers import Step
from ldm_ray.engine.board import Image
from ldm_ray.engine.generator import Generator
from ldm_ray.engine.jobs import Job, Outcome
from ldm_ray.engine.request import Course, ImageRequest
from ldm_ray.engine.slots import Closed, Slots, choose
from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.limits import MAX_SEED
from ldm_ray.settings.sampling import SamplingConfig
from tests.helpers.slots import Waited

LONG = SamplingConfig(sampler="ddpm", guidance_scale=1.0)  # 1000 steps
SHORT = SamplingConfig(num_inference_steps=3)


@pytest.fixture
def slots(generator: Generator) -> Iterator[Slots]:
    made = Slots(generator)
    yield made
    made.close()


def some_sampling(dice: random.Random) -> SamplingConfig:
    sampler = dice.choice(["unipc", "dpmpp_2m_sde", "dpmpp_2m", "ddim", "ddpm"])
    return SamplingConfig(
        sampler=sampler,
        num_inference_steps=dice.choice([1, 2, 5, 8, 70]),
        eta=dice.choice([0.0, 0.6]) if sampler == "ddim" else 0.0,
        guidance_scale=dice.choice([1.0, 1.0, 0.0, 2.5, 7.0]),
        guidance_start=dice.choice([0.0, 0.4, 0.85]),
    )


@pytest.mark.parametrize("capacity", [None, 24])
def test_bytes_in_random_company_are_the_generators(generator: Generator, capacity: int | None) -> None:
    dice, slots, jobs = random.Random(capacity), Slots(generator, capacity), []
    for _ in range(60):
        count = dice.choice([1, 1, 1, 2, 7, 40])
        labels = [dice.choice([None, *range(10)]) for _ in range(count)]
        first = dice.randrange(MAX_SEED - count)
        jobs.append(Waited(slots, count, some_sampling(dice), first, labels=labels))
        time.sleep(dice.random() * 0.006)
    for waited in jobs:
        job, request = waited.wait(), waited.job.request
        assert job.outcomes == [Outcome.DONE] * len(request.seeds)
        assert request.sampling is not None
        assert torch.equal(job.images, generator(request.seeds, request.labels, request.sampling)[:, 0]), request
        assert torch.equal(job.latents, generator.latents(request.seeds, request.labels, request.sampling))
    assert slots.outstanding == 0 and not slots.live
    assert slots.figures.rows >= slots.figures.steps > 0 and slots.rate > 0
    slots.close()
    assert not slots._thread.is_alive()


def test_a_short_job_does_not_wait_for_a_long_one(slots: Slots) -> None:
    long = Waited(slots, 64, LONG)
    long.moved()
    short = Waited(slots, 4, SHORT).wait()
    assert short.outcomes == [Outcome.DONE] * 4
    assert long.job.open == 64 and long.job.steps_done < 64 * 1000
    slots.cancel(long.job)
    long.wait()


def test_the_wait_of_a_new_job_is_for_what_it_does_not_pass(slots: Slots) -> None:
    assert slots.wait(8, 8) == 0  # nothing is known of the rate
    long = Waited(slots, 64, LONG)
    long.moved()
    slots._recent = (1000.0, 1.0)  # denoiser rows a second
    assert slots.outstanding == 64_000
    assert slots.wait(1000, 1000) == pytest.approx(65)  # behind its equals
    assert slots.wait(999, 1000) == pytest.approx(2)  # passes, with half of the capacity
    assert slots.wait(2000, 1000) == pytest.approx(130)  # others may pass: half of the capacity, behind all
    slots.cancel(long.job)
    long.wait()
    assert slots.outstanding == 0


def steps_of(count: int) -> Course:
    return Course((Step(0, 1.0, 0.0, 0.0, 1.0),) * count)


def test_beyond_capacity_short_jobs_pass_and_long_ones_still_move(generator: Generator) -> None:
    jobs = [Job(ImageRequest(range(4), [0] * 4, SHORT), steps_of(count)) for count in (3, 900, 1000)]
    images = [Image(job, i) for job in jobs for i in range(4)]
    images = images[4:] + images[:4]
    chosen = choose(images, 8)
    assert len(chosen) == 8 and set(images[8:]) <= set(chosen)  # fewest steps left
    assert set(images[:4]) <= set(chosen)  # came first
    assert choose(images, 12) == images


def test_beyond_capacity_equal_jobs_are_finished_in_their_order() -> None:
    jobs = [Job(ImageRequest(range(4), [0] * 4, LONG), steps_of(1000)) for _ in range(5)]
    images = [Image(job, i) for job in jobs for i in range(4)]
    for image in images[:8]:
        image.step = 10
    assert {image.job for image in choose(images, 8)} == set(jobs[:2])


def test_cancelling_takes_effect_within_two_steps_and_touches_no_other(generator: Generator, slots: Slots) -> None:
    doomed, other = Waited(slots, 20, LONG), Waited(slots, 20, replace(LONG, num_inference_steps=150), 100)
    doomed.moved()
    slots.cancel(doomed.job)
    at_cancel = doomed.job.steps_done
    job = doomed.wait()
    assert job.outcomes == [Outcome.CANCELLED] * 20
    # a leg's steps are counted when it ends: one leg of up to 64 may have been under way, and ends at its next step
    assert job.steps_done - at_cancel <= 20 * (64 + 2)
    kept = other.wait()
    sampling = kept.request.sampling
    assert sampling is not None
    assert torch.equal(kept.images, generator(kept.request.seeds, kept.request.labels, sampling)[:, 0])


def test_a_running_leg_ends_at_the_step_after_a_change(generator: Generator) -> None:
    slots = Slots(generator)
    slots.close()
    board = slots.board
    request = ImageRequest([1], [3], LONG)
    image = Image(Job(request, generator.course(request)), 0)
    board.join([image])
    from ldm_ray.engine.board import tiles_of

    (tile,) = tiles_of([image], lambda count: 16, limit=30)

    def taken() -> int:
        leg = board.leg(tile)
        assert leg is not None
        return leg.taken

    board.changed = False
    assert taken() == 30 == image.step
    board.changed = True
    assert taken() == 1
    board.changed, board.next_deadline = False, time.monotonic() - 1
    assert taken() == 1


def test_a_deadline_ends_its_own_job_alone(slots: Slots) -> None:
    late = Waited(slots, 4, LONG, deadline=time.monotonic() + 0.02)
    early = Waited(slots, 4, SHORT, deadline=time.monotonic() + 600)
    assert late.wait().outcomes == [Outcome.EXPIRED] * 4
    assert early.wait().outcomes == [Outcome.DONE] * 4


def test_numbers_that_are_not_finite_fail_one_image_alone(generator: Generator, slots: Slots) -> None:
    start = generator.latents(range(3), [1, 2, 3], SHORT)
    start[1] = 3e38  # finite, but not what comes out of the decoder's first product
    with torch.inference_mode():
        assert not bool(torch.isfinite(generator.codec.decode(start * 10)).all())
    job = Waited(slots, 3, SHORT, start=start).wait()
    assert job.outcomes == [Outcome.DONE, Outcome.FAILED, Outcome.DONE]
    assert not job.images[1].any() and job.images[0].any() and job.images[2].any()


def test_a_job_alone_goes_from_noise_to_images_in_one_round(
    generator: Generator, slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though only its last steps are guided."""
    sampling = SamplingConfig(num_inference_steps=8, guidance_scale=2.0, guidance_start=0.7)
    guided = sum(step.guided for step in generator.plan(sampling))
    assert 0 < guided < 8
    legs, leg = [], slots.board.leg
    monkeypatch.setattr(slots.board, "leg", lambda tile: legs.append(tile) or leg(tile))  # type: ignore[func-returns-value]
    job = Waited(slots, 5, sampling).wait()
    assert len(legs) == 1 and slots.figures.work == 5 * (8 + guided) == job.work
    assert torch.equal(job.images, generator(range(5), range(5), sampling)[:, 0])


def test_latents_alone_are_decoded(generator: Generator, slots: Slots) -> None:
    latents = torch.randn(50, 16, generator=torch.Generator().manual_seed(3))
    job = Waited(slots, 50, None, start=latents).wait()
    assert torch.equal(job.images, generator.decode(latents)[:, 0])


def test_a_request_is_frozen_and_its_steps_do_not_depend_on_guidance(generator: Generator) -> None:
    request = ImageRequest([1, 2], [3, None], SHORT)
    with pytest.raises(FrozenInstanceError):
        request.seeds = [4]  # type: ignore[misc]
    course = generator.course(request)
    assert generator.course(replace(request, sampling=replace(SHORT, guidance_scale=7.0))) is course
    assert generator.course(replace(request, sampling=LONG)) is not course
    assert request.rows(course.plan) == 2 * (3 + sum(step.guided for step in course.plan))


def test_images_are_shown_while_they_are_denoised(generator: Generator, slots: Slots) -> None:
    sampling = SamplingConfig(num_inference_steps=8, guidance_scale=2.0)
    seen: dict[int, torch.Tensor] = {}
    generator(range(5), [0] * 5, sampling, watch=lambda first, step, x0: seen.update({step + 1: x0.clone()}))
    waited = Waited(slots, 5, sampling, show=(2, 5, 8), labels=[0] * 5)
    waited.wait()
    assert sorted((step, i) for i, step, _ in waited.shown) == [(step, i) for step in (2, 5, 8) for i in range(5)]
    for i, step, picture in waited.shown:
        assert torch.equal(picture, generator.decode(seen[step])[i, 0])


def test_an_error_in_a_callback_stops_nothing(slots: Slots) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    slots.submit(ImageRequest([1], [1], SHORT, show=(1,)), on_image=fail, on_done=fail)
    assert Waited(slots, 2, SHORT).wait().outcomes == [Outcome.DONE] * 2


def test_closing_finishes_what_was_taken_in(generator: Generator) -> None:
    slots = Slots(generator)
    waited = Waited(slots, 8, SamplingConfig(sampler="ddpm", num_inference_steps=60))
    slots.close(drain_s=60)
    assert waited.job.outcomes == [Outcome.DONE] * 8
    with pytest.raises(Closed):
        Waited(slots, 1, SHORT)
    cut = Slots(generator)
    waited = Waited(cut, 8, LONG)
    cut.close()
    assert waited.job.outcomes == [Outcome.CANCELLED] * 8


def test_jobs_that_cannot_be_are_refused(slots: Slots) -> None:
    for seeds, labels, message in (
        ([], [], "at least one"),
        ([1, 2], [1], "as many of each"),
        ([-1], [1], "a seed is"),
        ([MAX_SEED + 1], [1], "a seed is"),
        ([1], [10], "label 10 is outside 0 to 9"),
    ):
        with pytest.raises(ConfigError, match=message):
            slots.submit(ImageRequest(seeds, labels, SHORT))
    with pytest.raises(ConfigError, match="made in fp32"):
        slots.submit(ImageRequest([1], [1], SamplingConfig(precision="bf16")))
    with pytest.raises(ConfigError, match="timesteps"):
        slots.submit(ImageRequest([1], [1], SamplingConfig(num_inference_steps=1001)))
    with pytest.raises(ConfigError, match="finite"):
        slots.submit(ImageRequest([1], [1], SHORT, start=torch.full((1, 16), torch.nan)))
    with pytest.raises(ConfigError, match="latents"):
        slots.submit(ImageRequest([1], [1], None))
    assert slots.outstanding == 0
