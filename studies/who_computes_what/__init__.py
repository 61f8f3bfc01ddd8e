"""Which implementations compute Gemma 2 as published, which compute something else, and in which use it shows.

Run in the folder of this repository:

    python -m studies.who_computes_what run --environments FOLDER                          # all of them; hours
    python -m studies.who_computes_what run --environments FOLDER --only 'litgpt 0.5.13'   # one of them
    python -m studies.who_computes_what page > docs/who-computes-what.md

Each implementation (`implementations.py`) is installed in an environment of its own in FOLDER (a PyTorch each, some GB
in all), builds its own Gemma 2 with the weights of a small random model (`run_one.py`, `recipes.py`, `deepmind.py`),
and writes traces, which are compared with this project's model (`runs.py`). What an implementation computes instead is
not read from its code but shown: with that one change injected into our model (`changes.py`), the two must agree to
rounding; if they do not, the page says that it is unexplained. `outcomes.json` keeps what was found, and `page.py`
prints it.
"""
