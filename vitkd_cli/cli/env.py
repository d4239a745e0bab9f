"""``vitkd env``: what a bug report needs."""

import json

from vitkd_cli.cli.flags import AsJson, command_of, waking


def _env(shown: AsJson) -> None:
    """Print what a bug report needs: versions, torch's build, devices, cores, memory. No path, no name of yours."""
    from vitkd_cli.terminal import Terminal

    with waking():
        from vitkd_cli.device import environment

        facts = environment()
    if shown.as_json:
        print(json.dumps(facts))
        return
    Terminal().facts(facts)


command = command_of("env", _env, AsJson)
