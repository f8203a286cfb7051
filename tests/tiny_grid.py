"""benchmarks/run.py on a grid of seconds: two good runs, one with a bad flag, one whose numbers break, a longer one."""

import benchmarks.run as runner

SMALL = "--num-envs 2 --num-steps 32 --num-minibatches 2 --update-epochs 1 --no-compile --checkpoint-interval 1"
VARIANTS = {
    1: {
        "NFPO": f"{runner.NFPO} {SMALL}",
        "PPO": f"{runner.PPO} {SMALL}",
        "bad": f"{runner.NFPO} {SMALL} --gamma 2",
        "scale-none": f"{runner.NFPO} {SMALL} --scale-fn none --learning-rate 1e6 --max-grad-norm 1e9",
    },
    2: {"NFPO": f"{runner.NFPO} {SMALL}"},
}
GRID = [
    runner.Experiment("S1", ("Hopper-v4",), ("NFPO", "PPO"), 1, 512),
    runner.Experiment("2", ("Hopper-v4",), ("bad", "scale-none"), 1, 512),
    runner.Experiment("long", ("Hopper-v4",), ("NFPO",), 1, 64 * 100, edition=2),
]

if __name__ == "__main__":
    runner.VARIANTS = VARIANTS
    runner.GRID[:] = GRID
    runner.main()
