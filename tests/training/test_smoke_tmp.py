import time, warnings
def test_a(tiny_config, tmp_path):
    from quweit_jax.training import loop
    for i in range(2):
        t=time.time(); r = loop.fit(tiny_config(), tmp_path/f"run{i}"); print(time.time()-t)
    from orbax.checkpoint import v1 as ocp
    import jax, numpy as np
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = ocp.load_checkpointables(tmp_path/"run0"/"checkpoints"/"20")
    print(jax.tree_util.tree_map(lambda a: (type(a), getattr(a,'shape',None)), x))
    import cProfile, pstats
    pr=cProfile.Profile(); pr.enable(); loop.fit(tiny_config(), tmp_path/f"run3"); pr.disable()
    pstats.Stats(pr).sort_stats('cumtime').print_stats(60)
