"""What becomes of each tensor, and where each byte of the result lies, before a weight is read.

Made from headers (or config.json alone): a plan for a model of any size takes seconds, and its
sizes are exact. Only `lossless.py` looks at weights, at those that are ternary already. The room
may import `models` and `sources`, and what is above them.

    recipe.py       the options of a conversion, each declared once
    recipe_files.py  recipes under a name, in a file or on record
    judge.py        what a tensor is, by the module that will run: its default
    judge_names.py  the same where no class of model is known
    judge_module.py  the same of a module of torch's, which is at hand
    rules.py        options on tensors as rules, first match wins; checks of them, of fused tensors
    choose.py       default and rules -> the choice for each tensor
    copied.py       the small files: what is copied, and what is left out
    layout.py       a plan as data: what each tensor becomes, and where its bytes lie
    lossless.py     the groups in which weights that are ternary already lose nothing
    engine.py       what files of an engine hold, of a conversion that is made for it
    plan.py         a checkpoint and a recipe -> the plan
    parts.py        which tensors each of several processes converts
"""
