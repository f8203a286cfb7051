"""Brax's PPO on MuJoCo Playground, timed: the contender of benchmarks/speed_playground.py, which calls this script.

Run:     python benchmarks/baselines/brax_ppo.py --env-id CartpoleBalance --num-envs 256 --iterations 160
Needs:   a virtual environment with the versions in BRAX_PINS of benchmarks/speed_playground.py, for Brax 0.14.2 calls
         jax.device_put_replicated, which JAX has no more since 0.10

Networks, environments, steps and the settings that cost time are those of `ppo_playground_jax.py`. Brax's own are the
squashed Gaussian, whose deviation depends on the observation, the loss, and advantages made anew for every minibatch.

Brax compiles an epoch, several training steps, into one function. Here a run has ten epochs, and Brax compiles during
the first two of them: its function sees other shardings in the second. Steps/s are therefore taken over the last eight,
everything between two epochs included, and the script ends with an error if JAX compiled anything in that time.
"""

import time

START = time.time()  # before the imports, which a user waits for as well

import argparse  # noqa: E402
import functools  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
from collections.abc import Mapping  # noqa: E402

import jax  # noqa: E402
from brax.training.agents.ppo import train as ppo  # noqa: E402
from brax.training.agents.ppo.networks import make_ppo_networks  # noqa: E402
from mujoco_playground import registry, wrapper  # noqa: E402

EPOCHS = 10
WARM_UP = 2  # of these epochs
HIDDEN_SIZES = (512, 256, 128)
NUM_STEPS = 24
NUM_MINIBATCHES = 4


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--env-id", default="CartpoleBalance")
    parser.add_argument("--num-envs", type=int, default=256, help="a multiple of 4, the number of minibatches")
    parser.add_argument("--iterations", type=int, default=160, help="Brax's training steps, a multiple of 10")
    parser.add_argument("--impl", help="physics: jax or warp; by default warp on an NVIDIA GPU and jax elsewhere")
    args = parser.parse_args()
    if args.num_envs % NUM_MINIBATCHES or args.iterations % EPOCHS:
        parser.error(f"--num-envs must be a multiple of {NUM_MINIBATCHES}, --iterations one of {EPOCHS}")
    return args


def main() -> None:
    args = parse_args()
    impl = args.impl or ("warp" if "NVIDIA" in jax.devices()[0].device_kind else "jax")
    env = registry.load(args.env_id, config_overrides={"impl": impl})
    config = registry.get_default_config(args.env_id)
    action_repeat = config.get("action_repeat", 1)
    sizes = env.observation_size
    privileged = isinstance(sizes, Mapping) and "privileged_state" in sizes

    marks = []  # (environment steps, unix time) before the first epoch and after each
    compilations = []  # (unix time of the end, seconds)

    def mark(step: int, *_) -> None:
        marks.append((step // action_repeat, time.time()))

    def note_compilation(event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append((time.time(), seconds))

    jax.monitoring.register_event_duration_secs_listener(note_compilation)
    ppo.train(
        environment=env,
        wrap_env_fn=wrapper.wrap_for_brax_training,
        episode_length=config.episode_length,
        action_repeat=action_repeat,
        num_timesteps=args.iterations * args.num_envs * NUM_STEPS * action_repeat,
        max_devices_per_host=1,
        num_envs=args.num_envs,
        unroll_length=NUM_STEPS,
        # A training step makes batch_size * NUM_MINIBATCHES / num_envs rollouts: with this, exactly one.
        batch_size=args.num_envs // NUM_MINIBATCHES,
        num_minibatches=NUM_MINIBATCHES,
        num_updates_per_batch=5,
        learning_rate=5e-4,
        discounting=0.99,
        gae_lambda=0.95,
        clipping_epsilon=0.2,
        entropy_cost=1e-3,
        vf_loss_coefficient=1.0,
        max_grad_norm=1.0,
        normalize_observations=True,
        network_factory=functools.partial(
            make_ppo_networks,
            policy_hidden_layer_sizes=HIDDEN_SIZES,
            value_hidden_layer_sizes=HIDDEN_SIZES,
            activation=jax.nn.elu,
            value_obs_key="privileged_state" if privileged else "state",
        ),
        num_evals=EPOCHS + 1,  # Brax's way to ask for EPOCHS epochs; run_evals then switches the evaluations off
        run_evals=False,
        policy_params_fn=mark,
        seed=1,
    )

    (first_steps, first_end), (warm_steps, warm_end), (steps, end) = marks[1], marks[WARM_UP], marks[-1]
    late = sum(seconds for when, seconds in compilations if when > warm_end and when <= end)
    if late > 0.01 * (end - warm_end):
        raise SystemExit(f"JAX compiled for {late:.1f} s of the {end - warm_end:.1f} s that are measured")
    steps_per_second = (steps - warm_steps) / (end - warm_end)
    report = {
        # The first epoch has several training steps: all but one are subtracted.
        "first_iteration_seconds": first_end - START - (first_steps - args.num_envs * NUM_STEPS) / steps_per_second,
        "steps_per_second": steps_per_second,
        "seconds": time.time() - START,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "steps": steps,
        "impl": impl,
        "marks": marks[1:],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
