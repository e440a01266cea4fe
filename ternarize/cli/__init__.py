"""The command line: what is asked for becomes a call of one function, and its result is shown.

Only this room prints. It may import from all others; nothing imports from it. Everything slow
(torch, transformers) is imported by the function of the command that needs it.

    terminal.py         results on stdout; errors, advice and a bar on stderr
    options.py          options that commands share, and those that are made from the recipe
    show.py             a packed checkpoint: tensors, sizes, calibration, measures
    show_plan.py        a plan
    show_check.py       what came of a conversion, and what to do next
    convert.py          the command of this name, as the ones that follow
    inspect_command.py
    verify.py
    evaluate.py         `ternarize eval`
    export.py
    generate.py
    bench.py
    push.py
    app.py              the program: its commands, signals, errors
"""
