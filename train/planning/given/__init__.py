"""What a plan is made from.

    sizes.py      the model, by the code that makes training's, on the meta device
    rows.py       the dataset, by its manifest or by assumption
    machine.py    rates and sizes of a machine of the catalogue
    here.py       the memory that is free on this one
    measuring.py  the rates of this one, measured
    layer.py      the seconds of a layer on this one, measured
    beside.py     the seconds of a step without anything to compute, measured

May import train.config, train.engine, train.lora, train.model, data and configs.program.
"""
