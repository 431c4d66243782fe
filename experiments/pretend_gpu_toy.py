from f4 import *
import numpy as np
from PIL import Image
os.chdir(tempfile.mkdtemp()); print(os.getcwd())
main("--toy --distill-steps 1 --critic-ratio 1 --frames 12")
main("--stream --prompt red --frames 24 --then 12 blue --reread --alpha .9")
Image.new("RGB",(40,40),"red").save("a.png")
main("--stream --prompt red --frames 12 --start a.png")
main("--stream --prompt red --frames 12 --sink 0")
