"""A model that keeps a journal of what it began and ended, takes its time, and now and then fails.

Its parameters: ``folder`` for the journal; ``seconds`` that a replicate takes, of which ``spread`` varies with its
number; ``checkpoints`` or not; ``gate``, the number of the replicate that ends only once the folder holds a file "go".
"""

import os
import random
import time

STEP_S = 0.05


def note(params, what, context):
    line = f"{what} {context.param} {context.replicate} {os.getpid()} {time.time():.6f}\n"
    journal = os.open(
        os.path.join(params["folder"], "journal"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666
    )
    os.write(journal, line.encode())
    os.close(journal)


def fail(params, context, error):
    note(params, "fail", context)
    raise error


def simulate(params, seed, context):
    note(params, "begin", context)
    if context.replicate % 11 == 5:
        fail(params, context, ValueError("this one never succeeds"))
    folder, rng = context.checkpoint_dir, random.Random(seed)
    kept = os.path.join(folder, "steps")
    done, walk = 0, 0.0
    if os.path.exists(kept):
        with open(kept) as f:
            done, walk = int(f.readline()), float(f.readline())
        for _ in range(done):
            rng.random()
    steps = round(params["seconds"] * (1 + params["spread"] * (context.replicate % 5 - 2) / 4) / STEP_S)
    while done < steps:
        time.sleep(STEP_S)
        walk += rng.random() - 0.5
        done += 1
        if params["checkpoints"] and done % 20 == 0:
            with open(kept, "w") as f:
                f.write(f"{done}\n{walk!r}\n")
            context.checkpoint()
    if context.replicate % 7 == 3:
        mark = os.path.join(params["folder"], f"failed-{context.param}-{context.replicate}")
        if not os.path.exists(mark):
            open(mark, "w").close()
            fail(params, context, RuntimeError("only the first time"))
    while context.replicate == params["gate"] and not os.path.exists(os.path.join(params["folder"], "go")):
        time.sleep(STEP_S)
    note(params, "end", context)
    return {"walk": walk, "seed": seed, "text": f"{params['p']} {context.replicate}" * 50}


def summarize(replicates):
    return {"n": len(replicates), "mean": sum(r["walk"] for r in replicates) / len(replicates)}
