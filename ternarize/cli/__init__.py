"""The command line: what is asked for becomes a call of one function, and its result is shown.

Only this room prints, and nothing imports from it; it may import from all others. What is slow
(torch, transformers) is imported by the function of the command that needs it.

    terminal.py         how all of them print: stdout, stderr, a bar; sizes and numbers in words
    options.py          options that commands share, and those that are made from the recipe
    show.py             what is shown of a plan, of a packed checkpoint, and after a conversion
    convert.py          `ternarize convert`: its recipe, its bounds, on which device
    train.py            `ternarize train`
    inspect_command.py  `ternarize inspect`
    verify.py           `ternarize verify`
    show_evaluation.py  what is shown of an evaluation: each text's figures, and what was written
    evaluate.py         `ternarize eval`
    export.py           `ternarize export`
    generate.py         `ternarize generate`
    chat.py             `ternarize chat`
    serve.py            `ternarize serve`
    bench.py            `ternarize bench`
    push.py             `ternarize push`
    recode.py           `ternarize recode`
    patches.py          `ternarize diff` and `ternarize apply`
    steps_train.py      `ternarize steps train`
    steps.py            `ternarize steps ...`
    app.py              the program: its commands, signals, errors
"""
