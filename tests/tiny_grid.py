"""benchmarks/run.py on a grid of seconds: two good runs, one with a bad flag, one whose numbers break."""

import benchmarks.run as runner

SMALL = "--num-steps 64 --num-minibatches 2 --update-epochs 1 --no-compile --checkpoint-interval 1"
runner.VARIANTS = {
    "NFPO": f"{runner.NFPO} {SMALL} --learned-base-std",
    "PPO": f"benchmarks/baselines/ppo_continuous_action.py {SMALL}",
    "bad": f"{runner.NFPO} {SMALL} --gamma 2",
    "scale-none": f"{runner.NFPO} {SMALL} --scale-fn none --learning-rate 1e6 --max-grad-norm 1e9 --update-epochs 4",
    "long": f"{runner.NFPO} {SMALL}",
}
runner.GRID[:] = [
    runner.Experiment("S1", ("Hopper-v4",), ("NFPO", "PPO"), 1, 512),
    runner.Experiment("2", ("Hopper-v4",), ("bad", "scale-none"), 1, 512),
    runner.Experiment("long", ("Hopper-v4",), ("long",), 1, 64 * 100),
]

if __name__ == "__main__":
    runner.main()
