"""Names and colours of the classes of the usual segmentation data sets, and of any other.

Names and colours of ADE20K, VOC and Cityscapes are those of mmsegmentation (ADE20K's are the first
words of the data set's own list of 150), CamVid's those of SegNet's test script.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from beit.data.limits import whole_number
from beit.errors import UserError
from beit.nearest import did_you_mean
from beit.printable import printable

MAX_CLASSES = 4096


class ClassSet(NamedTuple):
    """The classes 0..K-1 of a data set."""

    names: list[str]
    palette: np.ndarray  # (K, 3) uint8, RGB


def voc_palette(count: int) -> np.ndarray:
    """(count, 3) uint8: VOC's colours, made from the bits of the class number.

    Bits 0, 1 and 2 are the highest bits of red, green and blue, bits 3, 4 and 5 the next, and so
    on: no two numbers have the same colour.
    """
    numbers = np.arange(count)
    palette = np.zeros((count, 3), dtype=np.uint8)
    for place in range(8):
        for channel in range(3):
            palette[:, channel] |= ((numbers >> (3 * place + channel) & 1) << (7 - place)).astype(
                np.uint8
            )
    return palette


def class_set(
    classes: str | int | Sequence[str], palette: str | Sequence[Sequence[int]] = "auto"
) -> ClassSet:
    """Names and colours.

    Args:
        classes: the word for a known set (ade20k, camvid, voc, cityscapes), a text file with a name
            on each line, the names themselves, or their number (they are then "0", "1", ...).
        palette: a colour [red, green, blue] for each class, or "auto": those that the known set
            of these names has, of any other VOC's.

    Raises:
        UserError: no such set or file, no names, the same name twice, or a palette that is none.
    """
    if isinstance(classes, str) and classes in _KNOWN:
        names = list(_KNOWN[classes][0])
    else:
        names = _names(classes)
    return ClassSet(names, _palette(palette, _usual_colours(names)))


def _usual_colours(names: list[str]) -> np.ndarray:
    for known, colours in _KNOWN.values():
        if list(known) == names:
            return np.frombuffer(bytes.fromhex(colours), dtype=np.uint8).reshape(-1, 3)
    return voc_palette(len(names))


def _names(classes: str | int | Sequence[str]) -> list[str]:
    if isinstance(classes, str):
        names, origin = _names_in(classes), f"classes={printable(classes)}"
    elif isinstance(classes, int):
        count = min(whole_number("classes", classes, at_least=1), MAX_CLASSES + 1)
        names, origin = [str(number) for number in range(count)], f"classes={classes}"
    else:
        names, origin = [printable(str(name).strip()) for name in classes], "classes"
    if not names or not all(names):
        raise UserError(f"{origin}: expected a name for each class, and there is an empty one")
    if len(names) > MAX_CLASSES:
        raise UserError(f"{origin}: {len(names)} classes, expected at most {MAX_CLASSES}")
    for number, name in enumerate(names):
        if name in names[:number]:
            raise UserError(f"{origin}: '{name}' stands for {names.index(name)} and for {number}")
    return names


def _names_in(word: str) -> list[str]:
    path = Path(word).expanduser()
    if not path.is_file():
        near = did_you_mean(word, _KNOWN)
        raise UserError(
            f"classes={printable(word)}: neither a known set nor a text file with a name on each "
            f"line: {near}"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"classes={printable(word)}: cannot be read as UTF-8 text") from error
    while lines and not lines[-1].strip():
        lines.pop()
    return [printable(line.strip()) for line in lines]


def _palette(palette: str | Sequence[Sequence[int]], usual: np.ndarray) -> np.ndarray:
    if isinstance(palette, str):
        if palette != "auto":
            raise UserError(f"palette {palette!r}: expected auto, or a list of [red, green, blue]")
        return usual
    colours = [list(colour) for colour in palette]
    if len(colours) != len(usual):
        raise UserError(f"palette: {len(colours)} colours for {len(usual)} classes")
    return checked_colours("palette", colours)


def checked_colours(name: str, colours: Sequence[Sequence[int]]) -> np.ndarray:
    """(n, 3) uint8. Raises UserError for what is not three whole numbers in 0..255."""
    for colour in colours:
        whole = all(isinstance(value, int) and 0 <= value <= 255 for value in colour)
        if len(colour) != 3 or not whole:
            raise UserError(f"{name}: {list(colour)}; expected [red, green, blue], each 0 to 255")
    return np.array(colours, dtype=np.uint8).reshape(-1, 3)


_ADE20K = (
    "wall,building,sky,floor,tree,ceiling,road,bed,windowpane,grass,cabinet,sidewalk,person,earth,"
    "door,table,mountain,plant,curtain,chair,car,water,painting,sofa,shelf,house,sea,mirror,rug,"
    "field,armchair,seat,fence,desk,rock,wardrobe,lamp,bathtub,railing,cushion,base,box,column,"
    "signboard,chest of drawers,counter,sand,sink,skyscraper,fireplace,refrigerator,grandstand,"
    "path,stairs,runway,case,pool table,pillow,screen door,stairway,river,bridge,bookcase,blind,"
    "coffee table,toilet,flower,book,hill,bench,countertop,stove,palm,kitchen island,computer,"
    "swivel chair,boat,bar,arcade machine,hovel,bus,towel,light,truck,tower,chandelier,awning,"
    "streetlight,booth,television receiver,airplane,dirt track,apparel,pole,land,bannister,"
    "escalator,ottoman,bottle,buffet,poster,stage,van,ship,fountain,conveyer belt,canopy,washer,"
    "plaything,swimming pool,stool,barrel,basket,waterfall,tent,bag,minibike,cradle,oven,ball,food,"
    "step,tank,trade name,microwave,pot,animal,bicycle,lake,dishwasher,screen,blanket,sculpture,"
    "hood,sconce,vase,traffic light,tray,ashcan,fan,pier,crt screen,plate,monitor,bulletin board,"
    "shower,radiator,glass,clock,flag"
)
_ADE20K_COLOURS = """
787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d
787846 08ff33 ff0652 8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0
0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0 ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06
ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00 1fff00
ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff 00ff70
00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99
ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52
000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00
08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070 5cff00 00e0ff 70e0ff 46b8a0 a300ff
9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 0abed4 d6ff00
00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8
005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
"""
_CAMVID = "Sky,Building,Pole,Road,Pavement,Tree,SignSymbol,Fence,Car,Pedestrian,Bicyclist"
_CAMVID_COLOURS = """
808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0
"""
_VOC = (
    "background,aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,"
    "motorbike,person,pottedplant,sheep,sofa,train,tvmonitor"
)
_CITYSCAPES = (
    "road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,"
    "person,rider,car,truck,bus,train,motorcycle,bicycle"
)
_CITYSCAPES_COLOURS = """
804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e
000046 003c64 005064 0000e6 770b20
"""
_KNOWN = {
    "ade20k": (_ADE20K.split(","), _ADE20K_COLOURS),
    "camvid": (_CAMVID.split(","), _CAMVID_COLOURS),
    "voc": (_VOC.split(","), voc_palette(21).tobytes().hex()),
    "cityscapes": (_CITYSCAPES.split(","), _CITYSCAPES_COLOURS),
}
