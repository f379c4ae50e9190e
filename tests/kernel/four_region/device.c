// SPDX-License-Identifier: GPL-2.0
/*
 * What VFIO asks of the device: its infos, its regions by read, write and mmap, and PCI config space.
 *
 * Device memory is BAR 0 and can be mapped. Pages are mapped read-only at first, so that the first write to one is seen
 * here and marks it as dirty; a capture takes the mappings away again. No lock is taken there, as mmap_lock is held.
 */
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include "four_region.h"

static const struct fr_layout fr_natural = { 72, 16, 24, 32, 40, 48, 56, 64 };
static const struct fr_layout fr_packed = { 60, 12, 16, 24, 28, 36, 44, 52 };

#define FR_READ		VFIO_REGION_INFO_FLAG_READ
#define FR_RW		(FR_READ | VFIO_REGION_INFO_FLAG_WRITE)
#define FR_RWM		(FR_RW | VFIO_REGION_INFO_FLAG_MMAP)

/* ---- PCI config space: as much of it as whoever moves a PCI device has to carry */

#define FR_MSI		0x50

static void fr_pci_put(struct fr_device *fr, int offset, int size, u32 value, u32 writable)
{
	memcpy(fr->pci + offset, &value, size);
	memcpy(fr->pci_writable + offset, &writable, size);
}

static void fr_pci_reset(struct fr_device *fr)
{
	memset(fr->pci, 0, sizeof(fr->pci));
	fr_pci_put(fr, PCI_VENDOR_ID, 2, FR_VENDOR, 0);
	fr_pci_put(fr, PCI_DEVICE_ID, 2, FR_DEVICE, 0);
	fr_pci_put(fr, PCI_COMMAND, 2, 0, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_PARITY |
		   PCI_COMMAND_SERR | PCI_COMMAND_INTX_DISABLE);
	fr_pci_put(fr, PCI_STATUS, 2, PCI_STATUS_CAP_LIST, 0);
	fr_pci_put(fr, PCI_CLASS_REVISION, 4, 0x12000001, 0);	/* processing accelerator */
	fr_pci_put(fr, PCI_CACHE_LINE_SIZE, 1, 0, 0xff);
	/* Address bits below a BAR's size are fixed: that is how its size is asked for. */
	fr_pci_put(fr, PCI_BASE_ADDRESS_0, 4, 0, fr->type->memory ? -(u32)fr->type->memory : 0);
	fr_pci_put(fr, PCI_BASE_ADDRESS_2, 4, 0, -(u32)FR_REGISTERS_SIZE);
	fr_pci_put(fr, PCI_SUBSYSTEM_VENDOR_ID, 2, FR_VENDOR, 0);
	fr_pci_put(fr, PCI_SUBSYSTEM_ID, 2, FR_DEVICE, 0);
	fr_pci_put(fr, PCI_CAPABILITY_LIST, 1, FR_MSI, 0);
	fr_pci_put(fr, PCI_INTERRUPT_LINE, 1, 0xff, 0xff);
	fr_pci_put(fr, PCI_INTERRUPT_PIN, 1, 1, 0);
	fr_pci_put(fr, FR_MSI + PCI_CAP_LIST_ID, 1, PCI_CAP_ID_MSI, 0);
	fr_pci_put(fr, FR_MSI + PCI_MSI_FLAGS, 2, PCI_MSI_FLAGS_64BIT, PCI_MSI_FLAGS_ENABLE);
	fr_pci_put(fr, FR_MSI + PCI_MSI_ADDRESS_LO, 4, 0, ~3);
	fr_pci_put(fr, FR_MSI + PCI_MSI_ADDRESS_HI, 4, 0, ~0);
	fr_pci_put(fr, FR_MSI + PCI_MSI_DATA_64, 2, 0, 0xffff);
}

static void fr_pci_write(struct fr_device *fr, u64 offset, const u8 *data, size_t count)
{
	for (; count--; offset++, data++)
		fr->pci[offset] = (fr->pci[offset] & ~fr->pci_writable[offset]) | (*data & fr->pci_writable[offset]);
}

/* ---- read and write */

void fr_mark_memory(struct fr_device *fr, u64 offset, u64 count)
{
	unsigned long page = offset >> PAGE_SHIFT, end = (offset + count + PAGE_SIZE - 1) >> PAGE_SHIFT;

	for (; page < end; page++)
		set_bit(page, fr->dirty);
}

/* Regions that are memory, BAR 0 among them. */
static int fr_copy(struct fr_device *fr, u8 *region, u64 offset, char __user *user, size_t count, bool write)
{
	unsigned long left;

	if (!write)
		return copy_to_user(user, region + offset, count) ? -EFAULT : 0;
	left = copy_from_user(region + offset, user, count);
	if (region == fr->memory)
		fr_mark_memory(fr, offset, count);
	return left ? -EFAULT : 0;
}

static int fr_read_data(struct fr_device *fr, enum fr_index index, u64 offset, u8 *data, size_t count)
{
	switch (index) {
	case FR_INDEX_CONTROL:
		return fr_control_read(fr, offset, data, count);
	case FR_INDEX_REGISTERS:
		fr_registers_read(fr, offset, data, count);
		return 0;
	case FR_INDEX_PCI_CONFIG:
		memcpy(data, fr->pci + offset, count);
		return 0;
	case FR_INDEX_VERSION: {
		char text[128] = "";
		int length = fr_version_show(fr->type, text, sizeof(text));

		memset(data, 0, count);
		if (offset < length)
			memcpy(data, text + offset, min_t(u64, length - offset, count));
		return 0;
	}
	default:
		return -EINVAL;
	}
}

static int fr_write_data(struct fr_device *fr, enum fr_index index, u64 offset, const u8 *data, size_t count)
{
	switch (index) {
	case FR_INDEX_CONTROL:
		return fr_control_write(fr, offset, data, count);
	case FR_INDEX_REGISTERS:
		return fr_register_write(fr, offset, data, count);
	case FR_INDEX_PCI_CONFIG:
		fr_pci_write(fr, offset, data, count);
		return 0;
	case FR_INDEX_VERSION:
		return !offset && fr_version_accepts(fr->type, data, count) ? 0 : -EINVAL;
	default:
		return -EINVAL;
	}
}

static ssize_t fr_access(struct fr_device *fr, char __user *user, size_t count, loff_t *position, bool write)
{
	u64 index = *position >> FR_OFFSET_SHIFT, offset = *position & (BIT_ULL(FR_OFFSET_SHIFT) - 1);
	u8 *data = NULL, *memory;
	int ret = 0;

	if (index >= FR_NUM_REGIONS || !count || offset >= fr->regions[index].size ||
	    count > fr->regions[index].size - offset)
		return -EINVAL;
	memory = index == FR_INDEX_MEMORY_BAR ? fr->memory : fr->regions[index].data;
	if (!memory) {
		data = write ? memdup_user(user, count) : kmalloc(count, GFP_KERNEL);
		if (IS_ERR_OR_NULL(data))
			return data ? PTR_ERR(data) : -ENOMEM;
	}
	mutex_lock(&fr->lock);
	if (memory)
		ret = fr_copy(fr, memory, offset, user, count, write);
	else if (write)
		ret = fr_write_data(fr, index, offset, data, count);
	else
		ret = fr_read_data(fr, index, offset, data, count);
	mutex_unlock(&fr->lock);
	if (!ret && data && !write && copy_to_user(user, data, count))
		ret = -EFAULT;
	kfree(data);
	if (ret)
		return ret;
	*position += count;
	return count;
}

static ssize_t fr_read(struct vfio_device *vdev, char __user *user, size_t count, loff_t *position)
{
	return fr_access(to_fr(vdev), user, count, position, false);
}

static ssize_t fr_write(struct vfio_device *vdev, const char __user *user, size_t count, loff_t *position)
{
	return fr_access(to_fr(vdev), (char __user *)user, count, position, true);
}

/* ---- mmap */

static vm_fault_t fr_fault(struct vm_fault *vmf)
{
	struct fr_device *fr = vmf->vma->vm_private_data;

	if (vmf->pgoff >= fr->pages)
		return VM_FAULT_SIGBUS;
	return vmf_insert_pfn(vmf->vma, vmf->address, vmalloc_to_pfn(fr->memory + (vmf->pgoff << PAGE_SHIFT)));
}

static vm_fault_t fr_first_write(struct vm_fault *vmf)
{
	struct fr_device *fr = vmf->vma->vm_private_data;

	set_bit(vmf->pgoff, fr->dirty);
	return 0;
}

static const struct vm_operations_struct fr_memory_ops = {
	.fault = fr_fault,
	.pfn_mkwrite = fr_first_write,
};

static bool fr_mappable(const struct fr_region *region, u64 offset, u64 length)
{
	if (!(region->flags & VFIO_REGION_INFO_FLAG_MMAP) || offset >= region->size || length > region->size - offset)
		return false;
	for (u32 n = 0; n < region->nr_areas; n++) {
		const struct vfio_region_sparse_mmap_area *area = &region->areas[n];

		if (offset >= area->offset && offset + length <= area->offset + area->size)
			return true;
	}
	return !region->nr_areas;
}

static int fr_mmap(struct vfio_device *vdev, struct vm_area_struct *vma)
{
	struct fr_device *fr = to_fr(vdev);
	u64 index = vma->vm_pgoff >> (FR_OFFSET_SHIFT - PAGE_SHIFT);
	u64 page = vma->vm_pgoff & (BIT_ULL(FR_OFFSET_SHIFT - PAGE_SHIFT) - 1);

	if (index >= FR_NUM_REGIONS || !(vma->vm_flags & VM_SHARED) ||
	    !fr_mappable(&fr->regions[index], page << PAGE_SHIFT, vma->vm_end - vma->vm_start))
		return -EINVAL;
	if (index != FR_INDEX_MEMORY_BAR)
		return remap_vmalloc_range(vma, fr->regions[index].data, page);
	vm_flags_set(vma, VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP);
	vma->vm_private_data = fr;
	vma->vm_ops = &fr_memory_ops;
	return 0;
}

/* ---- infos */

static int fr_region_caps(const struct fr_region *region, struct vfio_info_cap *caps)
{
	struct vfio_region_info_cap_type type = {
		.header = { .id = VFIO_REGION_INFO_CAP_TYPE, .version = 1 },
		.type = region->type,
		.subtype = region->subtype,
	};
	struct vfio_region_info_cap_sparse_mmap *sparse;
	int ret = 0;

	if (region->type)
		ret = vfio_info_add_capability(caps, &type.header, sizeof(type));
	if (ret || !region->nr_areas)
		return ret;
	sparse = kzalloc(struct_size(sparse, areas, region->nr_areas), GFP_KERNEL);
	if (!sparse)
		return -ENOMEM;
	sparse->header = (struct vfio_info_cap_header){ .id = VFIO_REGION_INFO_CAP_SPARSE_MMAP, .version = 1 };
	sparse->nr_areas = region->nr_areas;
	memcpy(sparse->areas, region->areas, region->nr_areas * sizeof(*sparse->areas));
	ret = vfio_info_add_capability(caps, &sparse->header, struct_size(sparse, areas, region->nr_areas));
	kfree(sparse);
	return ret;
}

static long fr_region_info(struct fr_device *fr, void __user *user)
{
	unsigned long minsz = offsetofend(struct vfio_region_info, offset);
	struct vfio_info_cap caps = {};
	struct vfio_region_info info;
	long ret;

	if (copy_from_user(&info, user, minsz))
		return -EFAULT;
	if (info.argsz < minsz || info.index >= FR_NUM_REGIONS)
		return -EINVAL;
	info.flags = fr->regions[info.index].flags;
	info.size = fr->regions[info.index].size;
	info.offset = (u64)info.index << FR_OFFSET_SHIFT;
	info.cap_offset = 0;
	ret = fr_region_caps(&fr->regions[info.index], &caps);
	if (!ret && caps.size) {
		info.flags |= VFIO_REGION_INFO_FLAG_CAPS;
		if (info.argsz < sizeof(info) + caps.size) {
			info.argsz = sizeof(info) + caps.size;	/* ask again with this */
		} else {
			vfio_info_cap_shift(&caps, sizeof(info));
			info.cap_offset = sizeof(info);
			if (copy_to_user(user + sizeof(info), caps.buf, caps.size))
				ret = -EFAULT;
		}
	}
	kfree(caps.buf);
	if (!ret && copy_to_user(user, &info, minsz))
		ret = -EFAULT;
	return ret;
}

static long fr_device_info(void __user *user)
{
	unsigned long minsz = offsetofend(struct vfio_device_info, num_irqs);
	struct vfio_device_info info;

	if (copy_from_user(&info, user, minsz))
		return -EFAULT;
	if (info.argsz < minsz)
		return -EINVAL;
	info.flags = VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET;
	info.num_regions = FR_NUM_REGIONS;
	info.num_irqs = VFIO_PCI_NUM_IRQS;	/* with no interrupt in any of them */
	return copy_to_user(user, &info, minsz) ? -EFAULT : 0;
}

static long fr_irq_info(void __user *user)
{
	unsigned long minsz = offsetofend(struct vfio_irq_info, count);
	struct vfio_irq_info info;

	if (copy_from_user(&info, user, minsz))
		return -EFAULT;
	if (info.argsz < minsz || info.index >= VFIO_PCI_NUM_IRQS)
		return -EINVAL;
	info.flags = 0;
	info.count = 0;
	return copy_to_user(user, &info, minsz) ? -EFAULT : 0;
}

/* VFIO_DEVICE_FEATURE is not among them: the core answers it with ENOTTY, which tells this interface from its heirs. */
static long fr_ioctl(struct vfio_device *vdev, unsigned int command, unsigned long argument)
{
	struct fr_device *fr = to_fr(vdev);

	switch (command) {
	case VFIO_DEVICE_GET_INFO:
		return fr_device_info((void __user *)argument);
	case VFIO_DEVICE_GET_REGION_INFO:
		return fr_region_info(fr, (void __user *)argument);
	case VFIO_DEVICE_GET_IRQ_INFO:
		return fr_irq_info((void __user *)argument);
	case VFIO_DEVICE_RESET:
		mutex_lock(&fr->lock);
		fr_reset(fr);
		fr_pci_reset(fr);
		mutex_unlock(&fr->lock);
		return 0;
	default:
		return -ENOTTY;
	}
}

/* ---- life */

static int fr_open(struct vfio_device *vdev)
{
	struct fr_device *fr = to_fr(vdev);

	mutex_lock(&fr->lock);
	fr->open = true;
	fr_work_if_due(fr);
	mutex_unlock(&fr->lock);
	return 0;
}

/* Guest memory goes with who lent it. All else stays, and is there for who opens the device next. */
static void fr_close(struct vfio_device *vdev)
{
	struct fr_device *fr = to_fr(vdev);

	mutex_lock(&fr->lock);
	fr->open = false;
	fr_forget_guest(fr);
	mutex_unlock(&fr->lock);
	cancel_delayed_work_sync(&fr->work);
	fr->working = false;
}

static void fr_dma_unmap(struct vfio_device *vdev, u64 iova, u64 length)
{
	struct fr_device *fr = to_fr(vdev);

	mutex_lock(&fr->lock);
	fr_forget_guest_range(fr, iova, length);
	mutex_unlock(&fr->lock);
}

static void fr_release(struct vfio_device *vdev)
{
	struct fr_device *fr = to_fr(vdev);

	fr_forget_guest(fr);
	xa_destroy(&fr->guest_dirty);
	for (int index = 0; index < FR_NUM_REGIONS; index++)
		vfree(fr->regions[index].data);
	vfree(fr->memory);
	vfree(fr->saving.head);
	vfree(fr->loading.head);
	bitmap_free(fr->dirty);
	bitmap_free(fr->saving.unfetched);
	kfree(fr->registers);
	kfree(fr->page);
	mutex_destroy(&fr->lock);
}

static void fr_state_region(struct fr_device *fr, enum fr_index index, u64 size, enum fr_subtype subtype)
{
	fr->regions[index] = (struct fr_region){ size, FR_RW, FR_REGION_TYPE, subtype };
}

/* Parts: all but the first page and one in the middle, where there are so many. */
static int fr_data_region(struct fr_device *fr, enum fr_index index, u64 size, enum fr_subtype subtype)
{
	struct fr_region *region = &fr->regions[index];
	u64 middle = ALIGN_DOWN(size / 2, PAGE_SIZE);

	if (!size)
		return 0;
	fr_state_region(fr, index, size, subtype);
	if (fr->type->map != FR_MAP_NONE)
		region->flags = FR_RWM;
	if (fr->type->map == FR_MAP_SPARSE) {
		region->areas[0] = (struct vfio_region_sparse_mmap_area){ PAGE_SIZE, middle - PAGE_SIZE };
		region->areas[1] = (struct vfio_region_sparse_mmap_area){ middle + PAGE_SIZE, size - middle - PAGE_SIZE };
		region->nr_areas = 2;
	}
	region->data = vmalloc_user(size);
	return region->data ? 0 : -ENOMEM;
}

static int fr_make_regions(struct fr_device *fr)
{
	const struct fr_type *type = fr->type;
	int ret;

	if (type->memory)
		fr->regions[FR_INDEX_MEMORY_BAR] = (struct fr_region){ type->memory, FR_RWM };
	fr->regions[FR_INDEX_REGISTERS] = (struct fr_region){ FR_REGISTERS_SIZE, FR_RW };
	fr->regions[FR_INDEX_PCI_CONFIG] = (struct fr_region){ PCI_CFG_SPACE_SIZE, FR_RW };
	fr_state_region(fr, FR_INDEX_CONTROL, fr->layout->size, FR_CONTROL);
	fr->regions[FR_INDEX_VERSION] = (struct fr_region){ FR_VERSION_SIZE, FR_RW, FR_VERSION_TYPE, FR_VERSION_SUBTYPE };
	ret = fr_data_region(fr, FR_INDEX_CONFIG, type->config_region, FR_CONFIG);
	if (!ret && type->caps & FR_CAP_DEVICE_MEMORY)
		ret = fr_data_region(fr, FR_INDEX_MEMORY, type->memory_region, FR_MEMORY);
	if (!ret && type->caps & FR_CAP_SYSTEM_MEMORY)
		ret = fr_data_region(fr, FR_INDEX_BITMAP, type->bitmap_region, FR_BITMAP);
	return ret;
}

static int fr_make_memory(struct fr_device *fr)
{
	u64 bits, chunks;

	if (!fr->type->memory)
		return 0;
	fr->pages = fr->type->memory >> PAGE_SHIFT;
	bits = BITS_TO_LONGS(fr->pages) * sizeof(long);
	fr->head_size = PAGE_ALIGN(sizeof(struct fr_head) + bits);
	if (WARN_ON(fr->head_size > fr->type->memory_region))
		return -EINVAL;
	chunks = DIV_ROUND_UP(fr_capture_size(fr, fr->pages), fr->type->memory_region);
	fr->memory = vzalloc(fr->type->memory);
	fr->saving.head = vzalloc(fr->head_size);
	fr->loading.head = vzalloc(fr->head_size);
	fr->dirty = bitmap_zalloc(fr->pages, GFP_KERNEL);
	fr->saving.unfetched = bitmap_zalloc(chunks, GFP_KERNEL);
	if (!fr->memory || !fr->saving.head || !fr->loading.head || !fr->dirty || !fr->saving.unfetched)
		return -ENOMEM;
	return 0;
}

static int fr_init(struct vfio_device *vdev)
{
	struct fr_device *fr = to_fr(vdev);
	int ret;

	fr->type = container_of(to_mdev_device(vdev->dev)->type, struct fr_type, type);
	fr->layout = fr->type->packed ? &fr_packed : &fr_natural;
	mutex_init(&fr->lock);
	xa_init(&fr->guest_dirty);
	INIT_DELAYED_WORK(&fr->work, fr_work);
	fr->registers = kzalloc(FR_REGISTERS_SIZE, GFP_KERNEL);
	fr->page = kmalloc(PAGE_SIZE, GFP_KERNEL);
	ret = fr->registers && fr->page ? fr_make_memory(fr) : -ENOMEM;
	if (!ret)
		ret = fr_make_regions(fr);
	if (ret) {
		/* Nobody calls it where this fails. */
		fr_release(vdev);
		return ret;
	}
	mutex_lock(&fr->lock);
	fr_reset(fr);
	fr_pci_reset(fr);
	mutex_unlock(&fr->lock);
	return 0;
}

const struct vfio_device_ops fr_device_ops = {
	.name = "four-region",
	.init = fr_init,
	.release = fr_release,
	.open_device = fr_open,
	.close_device = fr_close,
	.read = fr_read,
	.write = fr_write,
	.ioctl = fr_ioctl,
	.mmap = fr_mmap,
	.dma_unmap = fr_dma_unmap,
	.bind_iommufd = vfio_iommufd_emulated_bind,
	.unbind_iommufd = vfio_iommufd_emulated_unbind,
	.attach_ioas = vfio_iommufd_emulated_attach_ioas,
	.detach_ioas = vfio_iommufd_emulated_detach_ioas,
};
