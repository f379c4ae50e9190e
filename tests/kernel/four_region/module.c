// SPDX-License-Identifier: GPL-2.0
/*
 * The module: which types of device there are, and their version attribute.
 *
 * A version says which devices fit together, as the interface's authors proposed it: reading it gives a string of the
 * driver's own; writing that of another device fails where a stream of that device would not be taken. It belongs to
 * the type, so it can be asked before there is a device.
 */
#include <linux/init.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/sysfs.h>

#include "four_region.h"

#define FR_NAME "four-region"
#define FR_CAPS (FR_CAP_DEVICE_MEMORY | FR_CAP_SYSTEM_MEMORY)

#define FR_TYPE(name, memory_, memory_region_, ...) { \
	.type.sysfs_name = (name), .memory = (memory_), .memory_region = (memory_region_), \
	.config_region = SZ_64K, .bitmap_region = SZ_64K, .caps = FR_CAPS, .generation = 1, ##__VA_ARGS__ }

/* Regions differ in size between the types, so that whoever moves state from one to another has to cut it anew. */
static struct fr_type fr_types[] = {
	FR_TYPE("16M", SZ_16M, SZ_16M),
	FR_TYPE("16M-sparse", SZ_16M, SZ_1M, .map = FR_MAP_SPARSE, .bitmap_region = SZ_16K),
	FR_TYPE("16M-nomap", SZ_16M, SZ_1M, .map = FR_MAP_NONE, .bitmap_region = SZ_4K),
	FR_TYPE("16M-packed", SZ_16M, SZ_4M, .packed = true, .config_region = SZ_1M),
	FR_TYPE("16M-small", SZ_16M, SZ_64K, .bitmap_region = SZ_4K),
	FR_TYPE("16M-next", SZ_16M, SZ_16M, .generation = 2),
	FR_TYPE("16M-untracked", SZ_16M, SZ_16M, .caps = FR_CAP_DEVICE_MEMORY),
	FR_TYPE("256K", SZ_256K, SZ_32K, .bitmap_region = SZ_4K),
	FR_TYPE("256K-sparse", SZ_256K, 5 * SZ_4K, .map = FR_MAP_SPARSE, .bitmap_region = SZ_16K),
	FR_TYPE("256K-nomap", SZ_256K, SZ_4K, .map = FR_MAP_NONE, .bitmap_region = SZ_4K),
	FR_TYPE("256K-packed", SZ_256K, SZ_64K, .packed = true),
	FR_TYPE("256K-untracked", SZ_256K, SZ_32K, .caps = FR_CAP_DEVICE_MEMORY),
	FR_TYPE("512K", SZ_512K, SZ_32K, .bitmap_region = SZ_4K),
	FR_TYPE("0M", 0, 0, .caps = FR_CAP_SYSTEM_MEMORY),
	FR_TYPE("64M", SZ_64M, SZ_16M),
	FR_TYPE("64M-sparse", SZ_64M, SZ_16M, .map = FR_MAP_SPARSE),
	FR_TYPE("256M", SZ_256M, SZ_16M),
};

static struct mdev_type *fr_mdev_types[ARRAY_SIZE(fr_types)];
static struct mdev_parent fr_parent;
static struct device *fr_parent_device;

static const struct class fr_class = {
	.name = FR_NAME,	/* types are named after it */
};

static int fr_version(const struct fr_type *type, u32 generation, char *text, size_t size)
{
	return scnprintf(text, size, "vfiostream-four-region,generation=%u,memory=%llu,config=%u", generation,
			 type->memory, FR_REGISTERS_SIZE);
}

int fr_version_show(const struct fr_type *type, char *text, size_t size)
{
	return fr_version(type, type->generation, text, size);
}

/* A generation takes what older ones send. What follows the text may be a line's end, or the zeros of a region. */
bool fr_version_accepts(const struct fr_type *type, const char *text, size_t size)
{
	char ours[128];
	int length;

	while (size && (!text[size - 1] || text[size - 1] == '\n'))
		size--;
	for (u32 generation = 1; generation <= type->generation; generation++) {
		length = fr_version(type, generation, ours, sizeof(ours));
		if (length == size && !memcmp(ours, text, size))
			return true;
	}
	return false;
}

static const struct fr_type *fr_type_of(struct kobject *kobj)
{
	return container_of(container_of(kobj, struct mdev_type, kobj), struct fr_type, type);
}

static ssize_t version_read(struct file *file, struct kobject *kobj, struct bin_attribute *attr, char *to,
			    loff_t offset, size_t count)
{
	char text[128];
	int length = fr_version_show(fr_type_of(kobj), text, sizeof(text) - 1);

	text[length] = '\n';
	return memory_read_from_buffer(to, count, &offset, text, length + 1);
}

static ssize_t version_write(struct file *file, struct kobject *kobj, struct bin_attribute *attr, char *from,
			     loff_t offset, size_t count)
{
	if (offset)
		return -EINVAL;
	return fr_version_accepts(fr_type_of(kobj), from, count) ? count : -EINVAL;
}

/* Binary, as plain attributes of a type are handed to functions that only the core can name. */
static BIN_ATTR_RW(version, 0);

static int fr_probe(struct mdev_device *mdev)
{
	struct fr_device *fr;
	int ret;

	fr = vfio_alloc_device(fr_device, vdev, &mdev->dev, &fr_device_ops);
	if (IS_ERR(fr))
		return PTR_ERR(fr);
	ret = vfio_register_emulated_iommu_dev(&fr->vdev);
	if (ret) {
		vfio_put_device(&fr->vdev);
		return ret;
	}
	dev_set_drvdata(&mdev->dev, fr);
	return 0;
}

static void fr_remove(struct mdev_device *mdev)
{
	struct fr_device *fr = dev_get_drvdata(&mdev->dev);

	vfio_unregister_group_dev(&fr->vdev);
	vfio_put_device(&fr->vdev);
}

static ssize_t fr_show_description(struct mdev_type *mtype, char *text)
{
	static const char * const maps[] = { "mappable", "mappable in parts", "not mappable" };
	const struct fr_type *type = container_of(mtype, struct fr_type, type);

	return sysfs_emit(text, "%llu KiB of memory, moved through a region of %llu KiB, %s%s\n", type->memory >> 10,
			  type->memory_region >> 10, maps[type->map], type->packed ? ", packed control" : "");
}

static struct mdev_driver fr_driver = {
	.device_api = VFIO_DEVICE_API_PCI_STRING,
	.max_instances = 64,
	.probe = fr_probe,
	.remove = fr_remove,
	.show_description = fr_show_description,
	.driver = {
		.name = FR_NAME,
		.owner = THIS_MODULE,
		.mod_name = KBUILD_MODNAME,
	},
};

static void fr_remove_versions(int count)
{
	while (count--)
		sysfs_remove_bin_file(&fr_types[count].type.kobj, &bin_attr_version);
}

static int __init fr_init(void)
{
	int ret, n;

	ret = mdev_register_driver(&fr_driver);
	if (ret)
		return ret;
	ret = class_register(&fr_class);
	if (ret)
		goto err_driver;
	fr_parent_device = device_create(&fr_class, NULL, MKDEV(0, 0), NULL, FR_NAME);
	if (IS_ERR(fr_parent_device)) {
		ret = PTR_ERR(fr_parent_device);
		goto err_class;
	}
	for (n = 0; n < ARRAY_SIZE(fr_types); n++)
		fr_mdev_types[n] = &fr_types[n].type;
	ret = mdev_register_parent(&fr_parent, fr_parent_device, &fr_driver, fr_mdev_types, ARRAY_SIZE(fr_types));
	if (ret)
		goto err_device;
	for (n = 0; n < ARRAY_SIZE(fr_types); n++) {
		ret = sysfs_create_bin_file(&fr_types[n].type.kobj, &bin_attr_version);
		if (ret)
			goto err_parent;
	}
	return 0;

err_parent:
	fr_remove_versions(n);
	mdev_unregister_parent(&fr_parent);
err_device:
	device_unregister(fr_parent_device);
err_class:
	class_unregister(&fr_class);
err_driver:
	mdev_unregister_driver(&fr_driver);
	return ret;
}

static void __exit fr_exit(void)
{
	fr_remove_versions(ARRAY_SIZE(fr_types));
	mdev_unregister_parent(&fr_parent);
	device_unregister(fr_parent_device);
	class_unregister(&fr_class);
	mdev_unregister_driver(&fr_driver);
}

module_init(fr_init);
module_exit(fr_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("A mediated device with the four-region device-state interface of 2019, for tests");
