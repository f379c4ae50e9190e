from __future__ import annotations
import os, multiprocessing, tempfile, dataclasses
import pytest
from tests.access_contract import AccessContract, Subject
from vfiostream.access.vfio_user import connect
from vfiostream.vendor.server import serve
from vfiostream.vendor.settings import Settings
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.inprocess import InProcessAccess
class Ref(Subject):
    def __init__(self, access, mmap):
        self.access=access; self.memory=11; self.unmappable=9
        self.whole = 11 if mmap=="whole" else None
        self.sparse = 11 if mmap=="sparse" else None
    async def device_reads(self, i, n): pytest.skip("no")
    async def device_writes(self, i, d): pytest.skip("no")
def run(path, w, mmap): serve(Settings(mmap=mmap), path, lambda: os.write(w,b"x"))
class TestServed(AccessContract):
    @pytest.fixture(params=["whole","sparse","none"])
    async def subject(self, request):
        path=tempfile.mkdtemp()+"/s"; r,w=os.pipe()
        p=multiprocessing.get_context("spawn").Process(target=run,args=(path,w,request.param)) if 0 else multiprocessing.get_context("fork").Process(target=run,args=(path,w,request.param))
        p.start(); os.read(r,1); os.close(r); os.close(w)
        try:
            async with await connect(path, timeout=10) as a: yield Ref(a, request.param)
        finally: p.terminate(); p.join()
class TestInProcess(AccessContract):
    @pytest.fixture(params=["whole","sparse","none"])
    async def subject(self, request):
        async with InProcessAccess(ReferenceDevice(Settings(mmap=request.param))) as a: yield Ref(a, request.param)
