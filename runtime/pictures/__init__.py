"""Pictures and masks, without any model.

image_io.py   picture files: what is read and what is kept when they are written
metadata.py   what a file says about its picture, carried as the bytes that came
previews.py   where files hide previews, and how they are removed
tiff.py       the structure of TIFF files and EXIF
png16.py      PNG files of 16 bits, which Pillow does not write
masks.py      where a mask becomes a hole
geometry.py   Box, Size, Mask
settings.py   strategy, working size, margin
crops.py      which parts of a picture the network sees, and at which size
canvas.py     a picture that crops are read from and pasted into
"""
