"""Programs that train several kinds of a model on the same data and write how they compare:
`python -m experiments.studies.NAME`.
"""
