#!/usr/bin/env python3
"""precompute (and train-teacher) stopped by SIGTERM while the teacher trains; the same command again.

Right: it goes on where it was, as its last line says ("the same command goes on").
"""
import atexit, os, pathlib, re, shutil, signal, subprocess, sys, tempfile

T = pathlib.Path(tempfile.mkdtemp(prefix="case04-")); atexit.register(shutil.rmtree, T, True)
os.environ.update(HOME=str(T), RICHKD_HOME=str(T / "home"), OMP_NUM_THREADS="1"); os.chdir(T)
data = ["--dataset", "shapes", "--limit", "256", "--device", "cpu"]
commands = {
    "precompute": ["richkd", "precompute", *data, "--teacher", "resnet8", "--clip", "none", "--views", "2", "--out", "s.zarr"],
    "train-teacher": ["richkd", "train-teacher", *data, "--model", "resnet8", "--out", "own.safetensors"],
}

def until_a_percentage(command):
    """Its first percentage (a line every 10 s), and then SIGTERM: what it said."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        lines = []
        for line in process.stderr:
            lines.append(line.rstrip())
            if re.match(r"teacher.*: \d+ %", line):
                process.send_signal(signal.SIGTERM)
                break
        lines += process.stderr.read().splitlines()
    percent = [int(m[1]) for l in lines if (m := re.match(r"teacher.*?: (\d+) %", l))]
    return process.returncode, percent[0] if percent else None, lines

texts, right = [], True
for name, command in commands.items():
    (rc, first, said), (_, second, again) = until_a_percentage(command), until_a_percentage(command)
    left = [str(p.relative_to(T)) for p in T.rglob("*") if p.is_file()]
    resumed = second is not None and first is not None and second > first + 0.5 * first and bool(left)
    resumed |= any(re.search(r"going on|resum", line) for line in again[:-1])
    right &= resumed
    texts.append(f"{'ok' if resumed else 'BAD'} {name}: {first} % then {rc} {said[-1]!r}; again: first {second} % ({len(left)} files left)")
print("; ".join(texts))
sys.exit(0 if right else 1)
