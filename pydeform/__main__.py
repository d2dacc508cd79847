import sys

from pydeform.cli import main

sys.exit(main())
