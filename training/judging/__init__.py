"""How good is a fill, and how did it come about?

metrics.py      PSNR, SSIM, L1
lpips.py        LPIPS, where its weights are given
baselines.py    the classical methods to compare with
evaluate.py     a model over a set of photographs and masks, by the hole's share of the picture or its shape
eval_cli.py     misf-eval
explain.py      what the filters and the other parts of a network do to one picture
explain_page.py that as a page with maps and numbers
explain_cli.py  misf-explain
"""
