"""Gaussian images of known standard deviation, and the denoiser that is exact for them."""

from dualout import schedules

SCHEDULE = schedules.Linear()
MEAN, SPREAD = 0.1, 0.3


def exact(x_t, t):
    """The exact denoiser of data from N(MEAN, SPREAD²)."""
    alpha, sigma, *_ = SCHEDULE.level(t).like(x_t)
    return MEAN + alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * (x_t - alpha * MEAN)
