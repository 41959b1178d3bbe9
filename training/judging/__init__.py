"""How good is a fill?

metrics.py      PSNR, SSIM, L1
lpips.py        LPIPS, where its weights are given
baselines.py    the classical methods to compare with
evaluate.py     a model over a set of photographs and masks, by the hole's share of the picture or its shape
eval_cli.py     misf-eval
"""
