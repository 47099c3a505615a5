"""Features computed once: a store of taps on disk under a content key, and training from it."""

from restuning.features.cached import Cached as Cached
from restuning.features.cached import StoredFeatures as StoredFeatures
from restuning.features.codec import DTYPES as DTYPES
from restuning.features.codec import PRECISIONS as PRECISIONS
from restuning.features.describe import describe_store as describe_store
from restuning.features.describe import list_stores as list_stores
from restuning.features.extract import Forecast as Forecast
from restuning.features.extract import build as build
from restuning.features.extract import forecast as forecast
from restuning.features.extract import place as place
from restuning.features.key import DataKey as DataKey
from restuning.features.key import StoreKey as StoreKey
from restuning.features.key import Tap as Tap
from restuning.features.key import store_key as store_key
from restuning.features.store import Store as Store
from restuning.features.store import default_root as default_root
from restuning.features.store import find_store as find_store
from restuning.features.store import remove as remove
from restuning.features.store import stores as stores
from restuning.features.stored import Stored as Stored
from restuning.features.stored import StoreOptions as StoreOptions
from restuning.features.stored import build_store as build_store
from restuning.features.stored import open_or_build as open_or_build
from restuning.features.views import VIEWS as VIEWS
from restuning.features.views import view_names as view_names
from restuning.features.views import view_of as view_of
