"""Started by path as `python -I -S launch.py JOB_FOLDER`: nothing but the standard library and this package.

-S saves the 2 ms of `site`, -I keeps PYTHONPATH and the working directory out. The package's folder
goes to the end of sys.path: beside it may lie backports with names of the standard library.
"""

import sys

if __name__ == "__main__":
    sys.path.append(__file__.rsplit("/", 3)[0])
    from lfsvc.runner.main import main

    sys.exit(main(sys.argv[1]))
