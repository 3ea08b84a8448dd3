"""Autoscaling of ModelPools: from what the routers measure to a number of workers, with a reason.

Everything in this package but `readers` is pure: no I/O, no clock, no randomness. Reading order:

- `expressions`, `signals`: what to read, once as PromQL and once as arithmetic over scraped samples.
- `readings`: a value that was read, and how far it can be trusted.
- `decide`: HorizontalPodAutoscaler's algorithm for one pool; `behavior` its windows and rates.
- `schedule`, `forecast`: lower bounds by the clock and by the day that repeats itself; `startup`: how far the latter must
  look ahead; `idleness`: to zero.
- `ranking`: which pool of a model costs fewest joules; `budget`: several pools under one limit of GPUs or watts.
- `autoscaler`: all of that for every pool, one step at a time; `victims`: which workers go first.
- `readers`: Prometheus, or the routers' own /metrics where there is none.
"""
